"""Seeing every function that a trained parameter has an influence on, and concluding from shapes how it uses samples.

Owns: the tracing pass and the conclusion from two of them. Does not own: which batches are traced, or the comparison of
contents (``observation``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_dp.bookkeeping.axes import SampleAxis, find_axis
from lightning_dp.bookkeeping.interception import (
    flat,
    float_outputs,
    function_name,
    intercepting,
    is_in_place,
    with_float_outputs,
    without_interception,
)
from lightning_dp.bookkeeping.layout import Key, Kind, Layout, Layouts
from lightning_dp.bookkeeping.random_state import RandomState

Shape = tuple[int, ...]

_SUMS = {"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub"}

_DOES_NOT_SCALE = (
    "its tensors do not scale with the number of samples ({}). Samples must not be compared with, added to or counted "
    "among each other where a trained parameter is used."
)
_REDUCED = (
    "it is applied to something already reduced over the batch, so the part of each sample cannot be told apart. Apply "
    "the parameter to every sample's own value and reduce afterwards."
)


class DifferentControlFlow(Exception):  # noqa: N818 - caught and retried, never shown
    """Two passes did not run the same functions."""


class Activation:
    """Marks a tensor that depends on the batch."""


@dataclass(frozen=True)
class Event:
    """What a traced function looked like: its name, the shapes (or values) of its leaves, the shapes of its outputs."""

    name: str
    leaves: tuple[Shape | int | None, ...]
    outputs: tuple[Shape, ...]


class Tracer:
    """One forward pass in which everything that depends on a trained parameter is followed.

    Args:
        names: Name of each trained parameter by ``id``.
        before: The events of the pass with two samples; ``None`` in that pass itself.
    """

    def __init__(self, names: Mapping[int, str], before: list[Event] | None) -> None:
        self.events: list[Event] = []
        self.layouts = Layouts()
        self._names, self._before = names, before
        self._class = intercepting(Tensor, self.dispatch)

    def dispatch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function as usual and note what it looked like."""
        with without_interception():
            name = function_name(func)
            if name is None:
                return func(*args, **kwargs)
            before = RandomState.now()
            result = func(*args, **kwargs)
            outputs = (args[0],) if name == "__setitem__" else float_outputs(result)
            if not outputs:
                return result
            random = RandomState.now().differs_from(before)
            mark = self._note(name, flat(args, kwargs), outputs, random)
            if name == "__setitem__":
                return result
            return with_float_outputs(result, [self._wrap(t, mark) for t in outputs])

    def _wrap(self, t: Tensor, mark: Any) -> Tensor:
        if type(t) is not self._class:
            t = t.as_subclass(self._class)
        t.mark = mark  # type: ignore[attr-defined]
        return t

    def _note(self, name: str, leaves: list[Any], outputs: tuple[Tensor, ...], random: bool) -> Any:
        """Note an event; return the mark of its outputs: the identity of a function of parameters, or an activation."""
        event = Event(name, tuple(map(_look, leaves)), tuple(tuple(t.shape) for t in outputs))
        at = len(self.events)
        self.events.append(event)
        if self._before is None:
            return None
        if at >= len(self._before) or self._before[at].name != name:
            raise DifferentControlFlow
        marks = [self._mark(leaf) for leaf in leaves]
        identities = tuple(m for m in marks if m is not None and not isinstance(m, Activation))
        layout = replace(conclude(self._before[at], event, any(isinstance(m, Activation) for m in marks)), random=random)
        key: Key = (name, identities)
        if identities:
            self.layouts.add(key, layout)
        return key if identities and layout.kind is Kind.DERIVED else Activation()

    def _mark(self, leaf: Any) -> Any:
        if type(leaf) is self._class:
            return leaf.mark
        if isinstance(leaf, nn.Parameter):
            return self._names.get(id(leaf)) if leaf.requires_grad else None
        return Activation() if isinstance(leaf, Tensor) and leaf.requires_grad else None


def conclude(two: Event, three: Event, on_activations: bool) -> Layout:
    """Conclude from the shapes with two and with three samples how one function depends on the batch."""
    try:
        axes = tuple(map(_axis, two.leaves, three.leaves))
        outputs = tuple(map(_axis, two.outputs, three.outputs))
    except ValueError as problem:
        return Layout(Kind.REFUSED, reason=_DOES_NOT_SCALE.format(problem))
    counts_samples = any(isinstance(n, int) and n != m for n, m in zip(two.leaves, three.leaves, strict=True))
    if any(axis is not None for axis in outputs):
        return Layout(Kind.PER_SAMPLE, axes, outputs, sliceable=not counts_samples and not is_in_place(two.name))
    carries_samples = any(axis is not None for axis in axes)
    if not carries_samples and not on_activations:
        return Layout(Kind.DERIVED, axes, outputs)
    if not carries_samples and two.name in _SUMS:
        return Layout(Kind.SHARED, axes, outputs)
    return Layout(Kind.REFUSED, axes, outputs, reason=_REDUCED)


def _look(leaf: Any) -> Shape | int | None:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    return leaf if isinstance(leaf, int) else None


def _axis(two: Shape | int | None, three: Shape | int | None) -> SampleAxis | None:
    return find_axis(two, three) if isinstance(two, tuple) and isinstance(three, tuple) else None
