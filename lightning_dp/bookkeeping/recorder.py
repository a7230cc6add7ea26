"""One forward and backward pass whose per-sample gradients go into a book.

Owns: the dispatch of every function that a trainable parameter enters, to a rule, to a derived tensor or to a refusal.
Does not own: the rules (``rules``), the observation of sample axes (``observation``).

"Ghost differentiation" (arXiv 2210.00038, section 3): the function runs on the *detached* parameter, so autograd
computes no weight gradient; a `Tap` on its output receives the output gradient and files an entry.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book, Derived, Target, release
from lightning_dp.bookkeeping.call import Call, identity, is_copy, is_transposition
from lightning_dp.bookkeeping.functions import (
    check_outputs,
    flat,
    float_outputs,
    function_name,
    is_in_place,
    map_leaves,
    out_of_place,
    reads_metadata,
    with_float_outputs,
)
from lightning_dp.bookkeeping.interception import Anchor, Tap, intercepting, is_swapped, without_interception
from lightning_dp.bookkeeping.layout import Key, Kind, Layout, Layouts, key_of
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.refusals import (
    closed_before,
    escaped,
    inner_gradient,
    kept_from_before,
    naming,
    no_gradient,
    overwritten,
    refusal,
    unobserved,
    written_in_place,
)
from lightning_dp.bookkeeping.rules import find_rule
from lightning_dp.bookkeeping.rules.embedding import check_table
from lightning_dp.bookkeeping.rules.generic import generic


class Recorder:
    """The dispatch of one pass.

    Args:
        names: Name of each trained parameter by ``id``.
        layouts: What was observed of the model.
        num_samples: B, the number of samples in the batch.
        recording: Whether a pass is being recorded now, this one or a later one.
        anchor: Stands for the parameters.
        lasting: Whether what a parameter holds in the forward pass is still there when the pass is closed.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        layouts: Layouts,
        num_samples: int,
        recording: Callable[[], bool],
        anchor: Anchor,
        lasting: bool = True,
    ) -> None:
        self._lasting = lasting
        self.book = Book(num_samples)
        self._names, self._layouts, self._recording_now = names, layouts, recording
        self._occurrences: dict[Key, int] = {}
        self._roots: dict[str, Tensor] = {}
        self._made: list[weakref.ref[Tensor]] = []
        self._anchor = anchor
        self._num_taps = self._num_received = 0
        self._closed = False

    def dispatch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function that a swapped parameter or a derived tensor enters."""
        with without_interception():
            name = function_name(func)
            check_table(func, args, kwargs)
            if name is None or not torch.is_grad_enabled():
                return func(*args, **kwargs)
            if func is torch.autograd.grad:
                raise inner_gradient("a trained parameter")
            leaves = flat(args, kwargs)
            targets = [self._target_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
            found = [identity(target) for target in targets if target is not None]
            if not found or self._closed or reads_metadata(name, targets[0] is not None):
                plain_args, plain_kwargs = map_leaves(self._plain, args, kwargs)
                return func(*plain_args, **plain_kwargs)
            call = Call(name, func, args, kwargs, leaves, targets, key_of(name, found))
            layout = self._layout(call.key)
            if is_in_place(name) or kwargs.get("out") is not None:
                return self._run_in_place(call, layout)
            return self._run(call, layout)

    def close(self) -> Book:
        """End the pass and return its book.

        Raises:
            UnsupportedModelError: If a gradient went past the book.
        """
        self._closed, book = True, self.book
        try:
            if self._num_taps and not self._num_received:
                raise no_gradient()
            self._layouts.check_counts(self._occurrences)
            self.carry()
        finally:
            self.abandon()
        return book

    def carry(self) -> None:
        """Carry what was filed for functions of parameters back to the parameters.

        Raises:
            UnsupportedModelError: If a gradient went past the book.
        """
        for name, leaf in self._roots.items():
            if leaf.grad is not None:
                raise escaped(name, self._layouts.where(name))
        self.book.carry()

    def abandon(self) -> None:
        """End the pass without a book; functions of parameters that the model kept become ordinary tensors."""
        self._closed = True
        for reference in self._made:
            t = reference()
            if t is not None and "derived" in vars(t):  # the same one may have been written several times
                release(t)
        self._made.clear()
        # The class of derived tensors refers to itself and to this, so that both wait for the garbage collector.
        self.book = Book(self.book.num_samples)

    def _run(self, call: Call, layout: Layout | None) -> Any:
        """Run a function of a parameter and something else, as it was observed."""
        if layout.kind is Kind.DERIVED if layout is not None else self._only_parameters(call):
            return self._derive(call)
        plain_args, plain_kwargs = map_leaves(self._plain, call.args, call.kwargs)
        random_state = RandomState.now() if layout is not None and layout.random else None
        result = call.func(*plain_args, **plain_kwargs)
        check_outputs(call.name, result)
        outputs = float_outputs(result)
        if not outputs:
            return result
        if layout is None:
            raise unobserved(call.key)
        record, saved = self._recording(call, layout, random_state)
        self._num_taps += 1
        taps = Tap.apply(self._wanted, record, len(outputs), self._anchor.leaf, *outputs, *saved)
        return with_float_outputs(result, taps if isinstance(taps, tuple) else (taps,))

    def _layout(self, key: Key) -> Layout | None:
        """Return the layout of this use of a function; uses in the backward pass are recomputations."""
        recomputed = torch._C._current_graph_task_id() != -1
        occurrence = self._occurrences.get(key, 0)
        if not recomputed:
            self._occurrences[key] = occurrence + 1
        return self._layouts.find(key, occurrence, recomputed)

    def _wanted(self) -> bool:
        """Whether the backward pass that runs now would accumulate into the parameters; asked by every `Tap`."""
        if torch.is_grad_enabled():
            raise inner_gradient("an input or an activation")
        wanted = self._anchor.is_wanted()
        if wanted and self._closed:
            raise closed_before()
        self._num_received += wanted
        return wanted

    def _recording(self, call: Call, layout: Layout, random_state: RandomState | None) -> Recording:
        if layout.leaves and len(layout.leaves) != len(call.leaves):
            raise unobserved(call.key)
        if layout.kind is Kind.REFUSED:
            return refusal(call.key, layout), []
        operation = Operation(
            func=call.func,
            args=call.args,
            kwargs=call.kwargs,
            leaves=call.leaves,
            layout=layout,
            book=self.book,
            targets=call.targets,
            plain=self._plain,
            random_state=random_state,
        )
        # Rules are about real numbers; the generic one is about any.
        rule = find_rule(call.func) if layout.kind is Kind.PER_SAMPLE and not _is_complex(call.leaves) else None
        recording = rule(operation, *call.args, **call.kwargs) if rule is not None else None
        record, saved = recording if recording is not None else generic(operation)
        return naming(call.key, layout, record), saved

    def _run_in_place(self, call: Call, layout: Layout | None) -> Any:
        """Run ``x.add_(p)`` as ``x.copy_(x.clone().add_(p))``: the second form has an output that can be tapped."""
        first = call.args[0]
        if not isinstance(first, Tensor) or "out" in call.kwargs:
            raise written_in_place(call.key)
        if layout is not None and layout.kind is Kind.DERIVED:
            self._write(call, first)
        elif self._target_of(first) is not None:
            raise written_in_place(call.key)
        else:
            arguments = (first.clone(), *call.args[1:])
            leaves = [arguments[0], *call.leaves[1:]]
            copied = replace(call, func=out_of_place(call.func), args=arguments, leaves=leaves)
            first.copy_(self._run(copied, layout))
        return None if call.name == "__setitem__" else first

    def _write(self, call: Call, first: Tensor) -> None:
        """Write a function of parameters into a constant, or a constant into such a function, which is another then.

        It is written in the graph of the parameters: if a view of it is used besides, that is an error of this graph
        or a gradient past the book, never a gradient lost.
        """
        if isinstance(first, torch.nn.Parameter):
            raise written_in_place(call.key)
        args, kwargs = self._in_own_graph(call)
        roots = self._roots_of(call)
        with self._kept():
            call.func(*args, **kwargs)
        derived = Derived(args[0].clone(), roots, call.key)  # of its own: the same tensor may be written again
        first.__class__ = self._derived_class
        first.derived, first.version = derived, first._version  # type: ignore[attr-defined]
        self._made.append(weakref.ref(first))

    def _derive(self, call: Call) -> Any:
        """Run a function of parameters alone on a graph of its own, through which entries are carried back."""
        args, kwargs = self._in_own_graph(call)
        with self._kept():
            result = call.func(*args, **kwargs)
        outputs = float_outputs(result)
        if not outputs or not any(t.requires_grad for t in outputs):
            return result
        return with_float_outputs(result, [self._wrap(call, t) for t in outputs])

    def _kept(self) -> AbstractContextManager[Any]:
        """Return a context in which a graph saves copies, where parameters do not last."""
        return nullcontext() if self._lasting else torch.autograd.graph.saved_tensors_hooks(torch.clone, _itself)

    def _in_own_graph(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if any(isinstance(t, Tensor) and t.requires_grad and not self._is_constant(t) for t in call.leaves):
            raise unobserved(call.key)  # an activation where only constants were observed: its gradient would be lost
        return map_leaves(self._in_graph, call.args, call.kwargs)

    def _roots_of(self, call: Call) -> dict[str, Tensor]:
        roots: dict[str, Tensor] = {}
        for target in call.targets:
            if target is not None:
                roots |= target.roots if isinstance(target, Derived) else {target: self._roots[target]}
        return roots

    def _wrap(self, call: Call, value: Tensor) -> Tensor:
        first = next(target for target in call.targets if target is not None)
        derived = Derived(value, self._roots_of(call), call.key)
        is_real = not (value.is_complex() or call.leaves[0].is_complex())
        if is_real and call.targets[0] is first and (is_transposition(call) or is_copy(call)):
            derived.source, derived.transposed = first, is_transposition(call)
        tensor = value.as_subclass(self._derived_class)
        tensor.derived, tensor.version = derived, tensor._version  # type: ignore[attr-defined]
        self._made.append(weakref.ref(tensor))
        return tensor

    def _is_constant(self, t: Tensor) -> bool:
        return is_swapped(t)

    def _target_of(self, leaf: Any) -> Target | None:
        name = self._names.get(id(leaf))
        if name is not None:
            return name if leaf.requires_grad else None
        if type(leaf) is Tensor:  # as nearly all that are no parameters: an attribute that is missing takes long
            return None
        derived: Derived | None = getattr(leaf, "derived", None) if isinstance(leaf, Tensor) else None
        if derived is not None:
            if (self._closed or type(leaf) is not self._derived_class) and self._recording_now():
                raise kept_from_before(derived.identity)
            if leaf._version != leaf.version:
                raise overwritten(derived.identity)
        return derived

    @functools.cached_property
    def _derived_class(self) -> type[Tensor]:
        return intercepting(Tensor, self.dispatch)  # only if there is any: to make a class takes long

    def _only_parameters(self, call: Call) -> bool:
        return not any(
            isinstance(leaf, Tensor) and target is None for leaf, target in zip(call.leaves, call.targets, strict=True)
        )

    def _plain(self, leaf: Any) -> Any:
        # A parameter that is not swapped is trained by ordinary autograd, beside the book.
        return leaf.detach() if is_swapped(leaf) else leaf

    def _in_graph(self, leaf: Any) -> Any:
        target = self._target_of(leaf)
        if isinstance(target, str):
            if target not in self._roots:
                self._roots[target] = leaf.detach().requires_grad_()
            return self._roots[target]
        return leaf.as_subclass(Tensor) if isinstance(target, Derived) else self._plain(leaf)


def _itself(t: Tensor) -> Tensor:
    return t


def _is_complex(leaves: list[Any]) -> bool:
    for leaf in leaves:  # noqa: SIM110 - many times in every step, and any() takes longer
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return True
    return False
