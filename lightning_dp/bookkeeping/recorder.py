"""One forward and backward pass whose per-sample gradients go into a book.

Owns: the dispatch of every function that a trainable parameter enters, to a rule, to a derived tensor or to a refusal.
Does not own: the rules (``rules``), the observation of sample axes (``observation``).

"Ghost differentiation" (arXiv 2210.00038, section 3): the function runs on the *detached* parameter, so autograd
computes no weight gradient; a `Tap` on its output receives the output gradient and files an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book, Derived, Target
from lightning_dp.bookkeeping.interception import (
    Tap,
    flat,
    float_outputs,
    function_name,
    intercepting,
    is_in_place,
    map_leaves,
    out_of_place,
    with_float_outputs,
    without_interception,
)
from lightning_dp.bookkeeping.layout import Key, Kind, Layout, Layouts, describe
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.rules import find_rule
from lightning_dp.bookkeeping.rules.generic import generic
from lightning_dp.errors import UnsupportedModelError

_TRANSPOSITIONS = {"t", "T", "mT", "adjoint"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
_COPIES = {"clone", "contiguous", "to", "float", "double", "bfloat16", "type_as", "type"}


class Probe(Protocol):
    """Sees the values of every function whose layout was used."""

    def __call__(self, key: Key, occurrence: int, leaves: list[Any], outputs: tuple[Tensor, ...]) -> None: ...


@dataclass
class Call:
    """One call of a torch function, and how the recorder knows it."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    key: Key


class Recorder:
    """The dispatch of one pass.

    Args:
        names: Name of each trained parameter by ``id``.
        layouts: What was observed of the model.
        num_samples: B, the number of samples in the batch.
        probe: Called with the values of every function that uses a layout.
    """

    def __init__(
        self, names: Mapping[int, str], layouts: Layouts, num_samples: int, probe: Probe | None = None
    ) -> None:
        self.book = Book(num_samples)
        self._names, self._layouts, self._probe = names, layouts, probe
        self._occurrences: dict[Key, int] = {}
        self._roots: dict[str, Tensor] = {}
        self._derived_class = intercepting(Tensor, self.dispatch)
        self._anchor = torch.zeros((), requires_grad=True)

    def dispatch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function that a swapped parameter or a derived tensor enters."""
        with without_interception():
            name = function_name(func)
            if name is None or not torch.is_grad_enabled():
                return func(*args, **kwargs)
            leaves = flat(args, kwargs)
            targets = [target for target in map(self._target_of, leaves) if target is not None]
            if not targets:
                plain_args, plain_kwargs = map_leaves(self._plain, args, kwargs)
                return func(*plain_args, **plain_kwargs)
            call = Call(name, func, args, kwargs, leaves, (name, tuple(map(identity, targets))))
            if is_in_place(name) or "out" in kwargs:
                return self._run_in_place(call)
            return self._run(call)

    def check_escapes(self) -> None:
        """Raise if a derived tensor got a gradient from autograd past the book."""
        for name, leaf in self._roots.items():
            if leaf.grad is not None:
                raise escaped(name)

    def _run(self, call: Call) -> Any:
        """Run a function of a parameter and something else, as it was observed."""
        occurrence = self._occurrences.get(call.key, 0)
        layout = self._layouts.find(call.key, occurrence)
        if layout.kind is Kind.DERIVED if layout is not None else self._only_parameters(call):
            self._note(call, occurrence, ())
            return self._derive(call)
        plain_args, plain_kwargs = map_leaves(self._plain, call.args, call.kwargs)
        random_state = RandomState.now() if layout is not None and layout.random else None
        result = call.func(*plain_args, **plain_kwargs)
        outputs = float_outputs(result)
        if not outputs:
            return result
        if layout is None:
            raise unobserved(call.key)
        self._note(call, occurrence, outputs)
        record, saved = self._recording(call, layout, random_state)
        taps = Tap.apply(record, len(outputs), self._anchor, *outputs, *saved)
        return with_float_outputs(result, taps if isinstance(taps, tuple) else (taps,))

    def _recording(self, call: Call, layout: Layout, random_state: RandomState | None) -> Recording:
        if layout.kind is Kind.REFUSED:
            return refusal(call.key, layout.reason), []
        operation = Operation(
            func=call.func,
            args=call.args,
            kwargs=call.kwargs,
            leaves=call.leaves,
            layout=layout,
            book=self.book,
            target_of=self._target_of,
            plain=self._plain,
            random_state=random_state,
        )
        rule = find_rule(call.func) if layout.kind is Kind.PER_SAMPLE else None
        recording = rule(operation, *call.args, **call.kwargs) if rule is not None else None
        return recording if recording is not None else generic(operation)

    def _run_in_place(self, call: Call) -> Any:
        """Run ``x.add_(p)`` as ``x.copy_(x.clone().add_(p))``: the second form has an output that can be tapped."""
        first = call.args[0]
        if self._target_of(first) is not None or "out" in call.kwargs:
            raise UnsupportedModelError(
                f"'{call.name}' writes in place, with {describe(call.key)} in its arguments, in a way that has no "
                "per-sample gradient: use the function that returns a new tensor."
            )
        arguments = (first.clone(), *call.args[1:])
        leaves = [arguments[0], *call.leaves[1:]]
        first.copy_(self._run(Call(call.name, out_of_place(call.func), arguments, call.kwargs, leaves, call.key)))
        return None if call.name == "__setitem__" else first

    def _derive(self, call: Call) -> Any:
        """Run a function of parameters alone on a graph of its own, through which entries are carried back."""
        args, kwargs = map_leaves(self._in_graph, call.args, call.kwargs)
        result = call.func(*args, **kwargs)
        outputs = float_outputs(result)
        if not outputs or not any(t.requires_grad for t in outputs):
            return result
        return with_float_outputs(result, [self._wrap(call, t) for t in outputs])

    def _wrap(self, call: Call, value: Tensor) -> Tensor:
        targets = [target for target in map(self._target_of, call.leaves) if target is not None]
        roots: dict[str, Tensor] = {}
        for target in targets:
            roots |= target.roots if isinstance(target, Derived) else {target: self._roots[target]}
        derived = Derived(value, roots, call.key)
        if self._target_of(call.leaves[0]) is targets[0] and (is_transposition(call) or is_copy(call)):
            derived.source, derived.transposed = targets[0], is_transposition(call)
        tensor = value.as_subclass(self._derived_class)
        tensor.derived = derived  # type: ignore[attr-defined]
        return tensor

    def _note(self, call: Call, occurrence: int, outputs: tuple[Tensor, ...]) -> None:
        self._occurrences[call.key] = occurrence + 1
        if self._probe is not None:
            self._probe(call.key, occurrence, call.leaves, outputs)

    def _target_of(self, leaf: Any) -> Target | None:
        if type(leaf) is self._derived_class:
            derived: Derived = leaf.derived
            return derived
        return self._names.get(id(leaf)) if isinstance(leaf, torch.nn.Parameter) and leaf.requires_grad else None

    def _only_parameters(self, call: Call) -> bool:
        return not any(isinstance(leaf, Tensor) and self._target_of(leaf) is None for leaf in call.leaves)

    def _plain(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Parameter) or type(leaf) is self._derived_class:
            return leaf.detach()
        return leaf

    def _in_graph(self, leaf: Any) -> Any:
        target = self._target_of(leaf)
        if isinstance(target, str):
            if target not in self._roots:
                self._roots[target] = leaf.detach().requires_grad_()
            return self._roots[target]
        return leaf.as_subclass(Tensor) if isinstance(target, Derived) else self._plain(leaf)


def is_copy(call: Call) -> bool:
    """Whether a function returns its first argument, up to memory layout and dtype."""
    return call.name in _COPIES


def is_transposition(call: Call) -> bool:
    """Whether a function returns the transpose of its first argument, a matrix."""
    if call.leaves[0].dim() != 2:
        return False
    return call.name in _TRANSPOSITIONS or (call.name in _SWAPS and {d % 2 for d in call.leaves[1:]} == {0, 1})


def identity(target: Target) -> Hashable:
    """Return what tells a parameter or a derived tensor from others in an observation."""
    return target.identity if isinstance(target, Derived) else target


def refusal(key: Key, reason: str) -> Callable[..., None]:
    """Return a record that raises: only a refused function whose gradient is really used is an error."""

    def record(*_: Tensor) -> None:
        raise UnsupportedModelError(f"'{key[0]}' of {describe(key)} has no exact per-sample gradient: {reason}")

    return record


def unobserved(key: Key) -> UnsupportedModelError:
    """Return the error for a function that no observation has seen."""
    return UnsupportedModelError(
        f"'{key[0]}' of {describe(key)} was not used when the model was observed, so it is not known where the samples "
        "lie in it. Make sure that every branch of the training step runs for the first samples of the dataset."
    )


def escaped(name: str) -> UnsupportedModelError:
    """Return the error for a gradient that autograd computed past the book."""
    return UnsupportedModelError(
        f"parameter '{name}' received a gradient that is not in the book: it enters an operation that torch does not "
        "let us see, such as a custom torch.autograd.Function, a ScriptModule or a compiled module. Freeze it "
        "(requires_grad_(False)) or write the operation in torch functions."
    )
