"""Seeing every function that a trained parameter has an influence on.

Owns: the tracing pass. Does not own: which batches are traced (``observation``), or what shapes (``conclusions``) and
contents (``contents``) tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.conclusions import Event, conclude, ints, look
from lightning_dp.bookkeeping.functions import (
    flat,
    float_outputs,
    function_name,
    is_in_place,
    reads_metadata,
    with_float_outputs,
)
from lightning_dp.bookkeeping.interception import intercepting, without_interception
from lightning_dp.bookkeeping.layout import Key, Kind, Layout, key_of
from lightning_dp.bookkeeping.packing import Packing, packing_of, without_dropout
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.rules.embedding import check_table
from lightning_dp.bookkeeping.rules.registered import is_registered
from lightning_dp.bookkeeping.source import calling_line
from lightning_dp.errors import UnsupportedModelError

_REDUCED_AND_USED = (
    "'{}' uses, for single samples, a sum of a trained parameter and something already reduced over the batch, so that "
    "every sample changes what is computed for all others. Reduce over the batch last."
)


class DifferentControlFlow(Exception):  # noqa: N818 - caught and retried
    """Two passes did not run the same functions; says which was the first."""


class Activation:
    """Marks a tensor that depends on the batch."""


class Reduced(Activation):
    """Marks a sum of a function of parameters and of something reduced over the batch, such as a regularised loss."""


Mark = Activation | Key | str | None
"""Marks a tensor; else the identity of a parameter or a function of parameters, ``None`` for a constant."""


@dataclass(frozen=True)
class Use:
    """One use of trained parameters, as it was concluded and with the tensors that it had."""

    key: Key
    layout: Layout
    with_gradient: bool
    leaves: list[Any]
    outputs: tuple[Tensor, ...]
    packing: Packing | None = None


class Tracer:
    """One forward pass in which everything that depends on a trained parameter is followed.

    Args:
        names: Name of each trained parameter by ``id``.
        before: The events of the pass with two samples; ``None`` in that pass itself.
        digest: What is to be kept of a leaf or an output with its sample axis.
        keep: The numbers of the uses whose outputs are to be kept themselves, in ``kept``.

    Attributes:
        events: What the functions looked like, in order.
        uses: The uses of trained parameters among them.
        kept: The outputs of the uses that were asked for.
        seen: The trained parameters that entered any function.
        registered: Those that entered one which its author registered.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        before: list[Event] | None,
        digest: Callable[[Any, SampleAxis | None], Any] = lambda leaf, axis: None,
        keep: Collection[int] = (),
    ) -> None:
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self._keep = keep
        self.events: list[Event] = []
        self.uses: list[Use] = []
        self.seen: set[str] = set()
        self.registered: set[str] = set()
        self._names, self._before, self._digest = names, before, digest
        self._class = intercepting(Tensor, self.dispatch)
        self._followed: list[weakref.ref[Tensor]] = []

    def dispatch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function as usual and note what it looked like."""
        with without_interception():
            name = function_name(func)
            if name is None:
                return func(*args, **kwargs)
            check_table(func, args, kwargs)
            leaves = flat(args, kwargs)
            packing, drops = packing_of(name, leaves), False
            if packing is not None:
                args, drops = without_dropout(args)
            entered = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
            self.registered |= entered if is_registered(func) else set()
            marks = [self._mark(leaf) for leaf in leaves]  # before a constant that is written into becomes another
            before = RandomState.now()
            result = func(*args, **kwargs)
            outputs = (args[0],) if name == "__setitem__" else float_outputs(result)
            # Inside a script or torch.vmap a function is shown, but its outputs have no graph that could be followed.
            self.seen |= entered if any(map(_has_graph, (*outputs, *tree_flatten(result)[0]))) else set()
            constant = torch.is_grad_enabled() and not any(t.requires_grad for t in outputs)
            if constant or not outputs or reads_metadata(name, self._is_followed(leaves[0])):
                return result
            random = drops or RandomState.now().differs_from(before)
            mark = self._note(name, leaves, marks, outputs, random, packing)
            if is_in_place(name):
                self._follow_written(outputs[0], mark)
            if is_in_place(name) or kwargs.get("out") is not None:
                return result  # the very tensor that was written, which the model may keep
            return with_float_outputs(result, [self._follow(t, mark) for t in outputs])

    def release(self) -> None:
        """Let go of what is followed, which the model may have kept."""
        for reference in self._followed:
            t = reference()
            if t is not None:
                t.__class__ = Tensor
                vars(t).pop("mark", None)

    def check_complete(self) -> None:
        """Raise if the pass ran fewer functions than the one before."""
        if self._before is not None and len(self.events) != len(self._before):
            raise DifferentControlFlow(f"'{self._before[len(self.events)].name}' was left out at the end")

    def _follow(self, t: Tensor, mark: Mark) -> Tensor:
        if type(t) is not self._class:
            t = t.as_subclass(self._class)
            self._followed.append(weakref.ref(t))
        t.mark = mark  # type: ignore[attr-defined]
        return t

    def _follow_written(self, t: Tensor, mark: Mark) -> None:
        """Follow the very tensor that was written, unless autograd knew it before as something else."""
        if type(t) is Tensor:
            t.__class__ = self._class
            self._followed.append(weakref.ref(t))
        if type(t) is self._class:
            t.mark = mark  # type: ignore[attr-defined]

    def _note(
        self,
        name: str,
        leaves: list[Any],
        marks: list[Mark],
        outputs: tuple[Tensor, ...],
        random: bool,
        packing: Packing | None,
    ) -> Mark:
        """Note an event; return the mark of its outputs."""
        shapes = tuple(tuple(t.shape) for t in outputs)
        event = Event(name, tuple(map(look, leaves)), shapes, tuple(map(ints, leaves)), packing)
        at = len(self.events)
        self.events.append(event)
        if self._before is None:
            return None
        if at >= len(self._before) or self._before[at].name != name:
            raise DifferentControlFlow(f"'{name}' was the first that differed, in {calling_line()}")
        on_activations = any(isinstance(m, Activation) for m in marks)
        layout = conclude(self._before[at], event, on_activations)
        layout = replace(layout, random=random, where=calling_line())
        if any(isinstance(m, Reduced) for m in marks) and any(axis is not None for axis in layout.outputs):
            raise UnsupportedModelError(_REDUCED_AND_USED.format(name))
        key = key_of(name, [m for m in marks if m is not None and not isinstance(m, Activation)])
        if key[1]:
            if len(self.uses) in self._keep:
                self.kept[len(self.uses)] = outputs
            self.uses.append(self._use(key, layout, leaves, marks, outputs, packing))
        if layout.kind is Kind.DERIVED:
            return key if key[1] else None
        return Reduced() if layout.kind is Kind.SHARED and key[1] else Activation()

    def _use(
        self,
        key: Key,
        layout: Layout,
        leaves: list[Any],
        marks: list[Mark],
        outputs: tuple[Tensor, ...],
        packing: Packing | None,
    ) -> Use:
        leaf_axes = layout.leaves or (None,) * len(leaves)
        output_axes = layout.outputs or (None,) * len(outputs)
        digests = [
            # A parameter does not depend on the batch; what a function of one was made of has been compared before.
            # Batch sizes follow the lengths of all samples, and the packing says how.
            self._digest(leaf, axis)
            if (mark is None or isinstance(mark, Activation)) and (packing is None or leaf is not packing.batch_sizes)
            else None
            for leaf, axis, mark in zip(leaves, leaf_axes, marks, strict=True)
        ]
        out = tuple(self._digest(t, axis) for t, axis in zip(outputs, output_axes, strict=True))
        return Use(key, layout, torch.is_grad_enabled(), digests, out, packing)

    def _is_followed(self, leaf: Any) -> bool:
        return type(leaf) is self._class or isinstance(leaf, nn.Parameter)

    def _mark(self, leaf: Any) -> Mark:
        if type(leaf) is self._class:
            mark: Mark = vars(leaf)["mark"]
            return mark
        if isinstance(leaf, nn.Parameter):
            return self._names.get(id(leaf)) if leaf.requires_grad else None
        return Activation() if isinstance(leaf, Tensor) and leaf.requires_grad else None


def _has_graph(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
