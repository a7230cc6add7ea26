"""Finding out which tensor axes carry the samples: by observation, never by guessing from sizes.

Owns: the observing passes and what their contents tell. Does not own: where samples come from, or what is recorded.

A ``[T, T]`` table indexed by position is no sample axis, even on the day T equals the batch size. Two things tell:

- *shapes*: one forward pass with two samples and one with three; what changed carries the batch;
- *contents*: two forward passes with three samples that differ in the first one; what changed belongs to that sample.
  This finds the order of merged (position, sample) axes, and refuses samples that influence each other.

The batches are made of two samples ``a`` and ``b`` of the user's own dataset: ``[a, b]`` and ``[a, a, b]``, then again
``[a, a, b]`` against ``[b, a, b]``. A collate function that pads to the longest sample gives them all one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.interception import Handler
from lightning_dp.bookkeeping.layout import Key, Kind, Layout, Layouts
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.recorder import Recorder
from lightning_dp.bookkeeping.tracing import DifferentControlFlow, Event, Tracer
from lightning_dp.errors import UnsupportedModelError

Swap = Callable[[Handler], AbstractContextManager[None]]
"""Context in which the functions that a trained parameter enters go to a handler."""

Forward = Callable[[str], None]
"""Runs the training step's forward pass on the samples named by a string: ``"aab"`` is ``[a, a, b]``."""

Seen = dict[tuple[Key, int], tuple[list[Tensor | None], list[Tensor | None]]]
"""For each function, a digest of every row of its leaves and of its outputs."""

_ATTEMPTS = 20
_TOLERANCE = 1e-4

_COUPLED = (
    "a sample changes what the function computes for another sample of the batch, so no sample has a gradient of its "
    "own. Batch normalisation and any other statistic over the batch do this: use group or layer normalisation."
)


def observe(names: Mapping[int, str], swap: Swap, forward: Forward, varied: bool = True) -> Layouts:
    """Observe a model.

    Args:
        names: Name of each trained parameter by ``id``.
        swap: Swaps the classes of the parameters around a pass.
        forward: Runs the forward pass.
        varied: Whether there are two different samples whose contents can be compared.

    Returns:
        The layouts of all functions that a trained parameter entered.

    Raises:
        UnsupportedModelError: If the functions that run differ from pass to pass.
    """
    state = RandomState.now()
    try:
        layouts = _observe_shapes(names, swap, forward, state)
        if varied:
            seen = [_observe_contents(names, layouts, swap, forward, samples, state) for samples in ("aab", "bab")]
            compare_contents(layouts, *seen)
        return layouts
    finally:
        state.restore()


def _observe_shapes(names: Mapping[int, str], swap: Swap, forward: Forward, state: RandomState) -> Layouts:
    for attempt in range(_ATTEMPTS):
        try:
            two = _trace(names, None, swap, forward, "ab", state)
            return _trace(names, two.events, swap, forward, "aab", state).layouts
        except DifferentControlFlow:  # layers dropped at random: draw again
            torch.manual_seed(attempt)
            state = RandomState.now()
    raise UnsupportedModelError(
        f"the training step ran other functions for two samples than for three, in each of {_ATTEMPTS} attempts: its "
        "control flow depends on the batch, so the axes that carry the samples cannot be observed."
    )


def _trace(
    names: Mapping[int, str],
    before: list[Event] | None,
    swap: Swap,
    forward: Forward,
    samples: str,
    state: RandomState,
) -> Tracer:
    state.restore()
    tracer = Tracer(names, before)
    with swap(tracer.dispatch):
        forward(samples)
    return tracer


def _observe_contents(
    names: Mapping[int, str], layouts: Layouts, swap: Swap, forward: Forward, samples: str, state: RandomState
) -> Seen:
    seen: Seen = {}

    def probe(key: Key, occurrence: int, leaves: list[Any], outputs: tuple[Tensor, ...]) -> None:
        layout = layouts.find(key, occurrence)
        if layout is not None:
            axes = layout.leaves or (None,) * len(leaves)
            seen[key, occurrence] = list(map(_digest, leaves, axes)), list(map(_digest, outputs, layout.outputs))

    state.restore()
    recorder = Recorder(names, layouts, len(samples), probe)
    with swap(recorder.dispatch):
        forward(samples)
    return seen


def _digest(leaf: Any, axis: SampleAxis | None) -> Tensor | None:
    """Return one number for each row along the sample axis, or one for the whole tensor."""
    if not isinstance(leaf, Tensor):
        return None
    rows = leaf.detach().as_subclass(Tensor).double()
    rows = rows.movedim(axis.dim, 0).flatten(1) if axis is not None and leaf.dim() > 1 else rows.reshape(-1, 1)
    if axis is None:
        rows = rows.reshape(1, -1)
    weight = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return rows @ weight


def compare_contents(layouts: Layouts, one: Seen, other: Seen) -> None:
    """Refine the layouts by two passes that differ in sample 0 of three."""
    for (key, occurrence), (leaves, outputs) in one.items():
        layout = layouts.find(key, occurrence)
        if (key, occurrence) not in other or layout is None or layout.kind in (Kind.REFUSED, Kind.SHARED):
            continue
        leaves_now, outputs_now = other[key, occurrence]
        pairs = [*zip(layout.leaves, leaves, leaves_now, strict=False)]
        pairs += [*zip(layout.outputs, outputs, outputs_now, strict=False)]
        found = [_order(axis, _changed(x, y)) for axis, x, y in pairs]
        layouts.replace(key, occurrence, _refined(layout, found))


def _changed(x: Tensor | None, y: Tensor | None) -> Tensor:
    if x is None or y is None or x.shape != y.shape:
        return torch.zeros(0, dtype=torch.bool)
    scale = torch.maximum(x.abs(), y.abs())
    different = (x - y).abs() > _TOLERANCE * scale
    return torch.nonzero(different | (x.isfinite() != y.isfinite())).flatten().cpu()


def _order(axis: SampleAxis | None, rows: Tensor) -> str:
    """Return "any", "sample first" or "row first", by which rows changed with sample 0; "coupled" if neither."""
    if rows.numel() == 0:
        return "any"
    if axis is None:
        return "coupled"
    in_first_block, strided = bool((rows < axis.rows).all()), bool((rows % 3 == 0).all())
    if in_first_block and strided:
        return "any"
    return "sample first" if in_first_block else "row first" if strided else "coupled"


def _refined(layout: Layout, found: list[str]) -> Layout:
    if "coupled" in found:
        return replace(layout, kind=Kind.REFUSED, reason=_COUPLED)
    if "row first" not in found:
        return layout

    def turned(axis: SampleAxis | None, order: str) -> SampleAxis | None:
        return axis.with_rows_outermost() if axis is not None and order != "sample first" and axis.rows > 1 else axis

    leaves = tuple(map(turned, layout.leaves, found))
    outputs = tuple(map(turned, layout.outputs, found[len(layout.leaves) :]))
    return replace(layout, leaves=leaves, outputs=outputs)

