"""What the shapes with two and with three samples tell of a function: how it depends on the batch.

Owns: the conclusion. Does not own: the passes that are compared (``tracing``, ``observation``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis, find_axis
from lightning_dp.bookkeeping.functions import is_in_place
from lightning_dp.bookkeeping.layout import REPEATING, Kind, Layout
from lightning_dp.bookkeeping.packing import Packing

Shape = tuple[int, ...]

_MAX_INTEGERS = 4096

_SUMS = {"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "add_", "__iadd__", "sub_", "__isub__"}

_DOES_NOT_SCALE = (
    "its tensors do not scale with the number of samples ({}). Samples must not be compared with, added to or counted "
    "among each other where a trained parameter is used, and rows not be chosen by content, as by an expert's router "
    "(in transformers: experts_implementation='batched_mm')."
)
_REDUCED = (
    "it is applied to something already reduced over the batch, so the part of each sample cannot be told apart. Apply "
    "the parameter to every sample's own value and reduce afterwards."
)
_COUNTS = (
    "one of its arguments holds integers that count samples, as for packed sequences or experts, so it is not "
    "known which rows belong to which sample. Pad the sequences instead of packing them; give every token the weights "
    "of its expert instead of sorting tokens by expert (in transformers: experts_implementation='batched_mm')."
)


@dataclass(frozen=True)
class Event:
    """What a traced function looked like.

    Args:
        name: Its name.
        leaves: The shapes (or values) of its leaves.
        outputs: The shapes of its outputs.
        integers: The contents of small integer tensors among the leaves.
        packing: The order of packed sequences, if a recurrent layer is given some.
    """

    name: str
    leaves: tuple[Shape | int | None, ...]
    outputs: tuple[Shape, ...]
    integers: tuple[tuple[int, ...] | None, ...] = ()
    packing: Packing | None = None


def conclude(two: Event, three: Event, on_activations: bool) -> Layout:
    """Conclude from the shapes with two and with three samples how one function depends on the batch."""
    if two.packing is not None and three.packing is not None:
        return _packed(two.packing, three.packing, three)
    try:
        outputs = tuple(map(_axis, two.outputs, three.outputs))
        if len(two.leaves) != len(three.leaves):
            return _repeated(three, outputs, on_activations)
        axes = tuple(map(_axis, two.leaves, three.leaves))
    except ValueError as problem:
        return Layout(Kind.REFUSED, reason=_DOES_NOT_SCALE.format(problem))
    if any(m != n and axis is None for m, n, axis in zip(two.integers, three.integers, axes, strict=True)):
        return Layout(Kind.REFUSED, axes, outputs, reason=_COUNTS)
    counts_samples = any(isinstance(n, int) and n != m for n, m in zip(two.leaves, three.leaves, strict=True))
    if any(axis is not None for axis in outputs):
        return Layout(Kind.PER_SAMPLE, axes, outputs, sliceable=not counts_samples and not is_in_place(two.name))
    carries_samples = any(axis is not None for axis in axes)
    if not carries_samples and not on_activations:
        return Layout(Kind.DERIVED, axes, outputs)
    if not carries_samples and two.name in _SUMS and all(math.prod(shape) == 1 for shape in three.outputs):
        return Layout(Kind.SHARED, axes, outputs)
    return Layout(Kind.REFUSED, axes, outputs, reason=_REDUCED)


def _packed(two: Packing, three: Packing, event: Event) -> Layout:
    """Conclude for a recurrent layer: packed data has its rows on axis 0, states have the sequences on axis 1."""
    problem = two.problem(2) or three.problem(3)
    if problem:
        return Layout(Kind.REFUSED, reason=problem)
    data, states = SampleAxis(0, 1), SampleAxis(1, 1)
    num_states = len(event.outputs) - 1
    leaves = (data, None, *[states] * num_states, *[None] * (len(event.leaves) - 2 - num_states))
    return Layout(Kind.PER_SAMPLE, leaves, (data, *[states] * num_states), packed=True)


def _repeated(three: Event, outputs: tuple[SampleAxis | None, ...], on_activations: bool) -> Layout:
    """Conclude for a function with one argument for each sample, ``torch.stack([p] * B)``."""
    one_per_sample = any(axis is not None and axis.rows == 1 for axis in outputs)
    if three.name in REPEATING and not on_activations and one_per_sample:
        return Layout(Kind.PER_SAMPLE, (), outputs, sliceable=False)
    return Layout(Kind.REFUSED, reason=_DOES_NOT_SCALE.format(f"{len(three.leaves)} arguments with three"))


def look(leaf: Any) -> Shape | int | None:
    """Return the shape of a tensor, or the value of a number or a slice."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    if isinstance(leaf, slice):
        return hash((leaf.start, leaf.stop, leaf.step)) if leaf != slice(None) else None
    return leaf if isinstance(leaf, int) else None


def ints(leaf: Any) -> tuple[int, ...] | None:
    """Return the contents of a small tensor of integers."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or leaf.numel() > _MAX_INTEGERS:
        return None
    return tuple(leaf.detach().flatten().tolist())


def _axis(two: Shape | int | None, three: Shape | int | None) -> SampleAxis | None:
    return find_axis(two, three) if isinstance(two, tuple) and isinstance(three, tuple) else None
