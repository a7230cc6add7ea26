"""Finding out which tensor axes carry the samples: by observation, never by guessing from sizes.

Owns: the observing passes and what their contents tell. Does not own: where samples come from, or what is recorded.

A ``[T, T]`` table indexed by position is no sample axis, even on the day T equals the batch size. Two things tell:

- *shapes*: one forward pass with two samples and one with three; what changed carries the batch;
- *contents*: two forward passes with three samples that differ in the first one; what changed belongs to that sample.
  This finds the order of merged (position, sample) axes, and refuses samples that influence each other.

The batches are made of two samples ``a`` and ``b`` of the user's own dataset: ``[a, b]`` against ``[a, a, b]``, and
``[a, a, b]`` against ``[b, a, b]``. A collate function that pads to the longest sample gives them all one length.

What a pass changes besides, such as buffers, is the caller's to restore between the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.interception import Handler, without_interception
from lightning_dp.bookkeeping.layout import Kind, Layout, Layouts
from lightning_dp.bookkeeping.packing import Packing
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.source import check_opaque
from lightning_dp.bookkeeping.tracing import DifferentControlFlow, Event, Tracer, Use
from lightning_dp.bookkeeping.witness import ROUNDS, Witness, routing
from lightning_dp.errors import UnsupportedModelError

Swap = Callable[[Handler], AbstractContextManager[None]]
"""Context in which the functions that a trained parameter enters go to a handler."""

Forward = Callable[[str], Any]
"""Runs the training step's forward pass on the samples named by a string (``"aab"`` is ``[a, a, b]``) for its loss."""

_QUIET_ROUNDS = 3
"""How many rounds must show no new function before no more are expected."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""Relative change of a row's contents that may be rounding: equal shapes run equal kernels, so it is hardly any."""

_COUPLED = (
    "a sample changes what the function computes for another sample of the batch, so no sample has a gradient of its "
    "own. Batch normalisation and any other statistic over the batch do this: use group or layer normalisation. "
    "So does sorting the samples of a batch by their length: leave that to pack_padded_sequence(enforce_sorted=False)."
)
_UNKNOWN_ORDER = (
    "an axis holds several rows of every sample, and which rows belong to which sample cannot be told, because the "
    "first two samples do not differ there. Keep an axis of the samples alone where this parameter is used."
)

_DEPENDS_ON_BATCH = (
    "the training step ran other functions for two samples than for three, or for other samples: its control flow "
    "depends on the batch, so the axes that carry the samples cannot be observed."
)


@dataclass(frozen=True)
class _Pass:
    """What one pass showed: its events and uses, and what the witness saw."""

    events: list[Event]
    uses: list[Use]
    witness: Witness

    @property
    def random(self) -> bool:
        """Whether the pass drew random numbers."""
        return self.witness.num_draws > 0


@dataclass(frozen=True)
class Digest:
    """One number for each row of a tensor along its sample axis (or one for all), and the size that it could have."""

    value: Tensor
    scale: Tensor
    tolerance: float


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
    original = RandomState.of_all()
    layouts, quiet_rounds, failures = Layouts(), 0, 0
    try:
        for seed in range(ROUNDS):
            try:
                found, random = _observe(names, swap, forward, varied, original, seed)
            except DifferentControlFlow:  # a first pass may fill a cache; what goes on depends on the batch
                failures += 1
                if failures == _QUIET_ROUNDS:
                    raise UnsupportedModelError(_DEPENDS_ON_BATCH) from None
                continue
            quiet_rounds = 0 if layouts.extend(found) else quiet_rounds + 1
            if not random or quiet_rounds == _QUIET_ROUNDS:
                break
    finally:
        original.restore()
    return layouts


def _observe(
    names: Mapping[int, str], swap: Swap, forward: Forward, varied: bool, state: RandomState, seed: int
) -> tuple[Layouts, bool]:
    """Return the layouts of one round, and whether anything was random in it."""
    two = _trace(names, None, swap, forward, "ab", state, seed)
    three = _trace(names, two.events, swap, forward, "aab", state, seed)
    other = _trace(names, two.events, swap, forward, "bab" if varied else "aab", state, seed)
    if [use.key for use in three.uses] != [use.key for use in other.uses]:
        raise DifferentControlFlow
    layouts = Layouts()
    for use, its in zip(three.uses, other.uses, strict=True):
        layout = refined(use, its)
        reason = routing(layout, two.witness, three.witness)
        if reason:
            layout = replace(layout, kind=Kind.REFUSED, reason=reason)
        layouts.add(use.key, layout, use.with_gradient)
    return layouts, three.random


def _trace(
    names: Mapping[int, str],
    before: list[Event] | None,
    swap: Swap,
    forward: Forward,
    samples: str,
    state: RandomState,
    seed: int,
) -> _Pass:
    state.restore()
    tracer, witness = Tracer(names, before, digest), Witness(seed, len(samples))
    try:
        with swap(tracer.dispatch), witness:
            loss = forward(samples)
        if before is not None:  # only then is it known what every function was used for
            with without_interception():
                check_opaque(loss, names, tracer.seen, tracer.registered, lambda: forward(samples))
    finally:
        tracer.release()
    tracer.check_complete()
    return _Pass(tracer.events, tracer.uses, witness)


def digest(leaf: Any, axis: SampleAxis | None) -> Digest | None:
    """Return what tells whether the contents of a leaf changed, and in which rows along the sample axis."""
    if isinstance(leaf, bool | int | float):
        leaf = torch.tensor([leaf], dtype=torch.float64)
    if isinstance(leaf, slice):
        leaf = torch.tensor([n for n in (leaf.start, leaf.stop, leaf.step) if isinstance(n, int)], dtype=torch.float64)
    if not isinstance(leaf, Tensor) or leaf.is_complex():
        return None
    tolerance = _TOLERANCE.get(leaf.dtype, 0.0)
    rows = leaf.detach().as_subclass(Tensor).double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis.dim, 0).reshape(rows.shape[axis.dim], -1)
    weight = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return Digest((rows @ weight).cpu(), (rows.abs() @ weight).cpu(), tolerance)


def refined(use: Use, other: Use) -> Layout:
    """Refine a layout by a second pass, which differs in sample 0 of three."""
    layout = use.layout
    if layout.kind in (Kind.REFUSED, Kind.SHARED):
        return layout
    axes = (*(layout.leaves or (None,) * len(use.leaves)), *layout.outputs)
    pairs = zip((*use.leaves, *use.outputs), (*other.leaves, *other.outputs), axes, strict=True)
    if use.packing is not None and other.packing is not None:
        coupled = other.packing.problem(3) or not all(_fits_packed(use.packing, other.packing, *pair) for pair in pairs)
        return replace(layout, kind=Kind.REFUSED, reason=_COUPLED) if coupled else layout
    orders = [order(axis, changed(x, y), x) for x, y, axis in pairs]
    if "coupled" in orders:
        return replace(layout, kind=Kind.REFUSED, reason=_COUPLED)
    known = {order for order in orders if order in ("sample first", "row first")}
    if "unknown" in orders and len(known) != 1:
        return replace(layout, kind=Kind.REFUSED, reason=_UNKNOWN_ORDER)
    if "row first" not in known:
        return layout

    def turned(axis: SampleAxis | None, order: str) -> SampleAxis | None:
        return axis.with_rows_outermost() if axis is not None and order in ("row first", "unknown") else axis

    leaves = tuple(map(turned, layout.leaves, orders))
    return replace(layout, leaves=leaves, outputs=tuple(map(turned, layout.outputs, orders[-len(layout.outputs) :])))


def _fits_packed(packing: Packing, other: Packing, x: Digest | None, y: Digest | None, axis: SampleAxis | None) -> bool:
    """Whether the rows of samples 1 and 2 are the same in both passes; sample 0 may have another length."""
    if axis is None or x is None or y is None:
        return order(None, changed(x, y), x) == "fits"
    for sample in (1, 2):
        rows = [p.rows_of(sample) if axis.dim == 0 else p.places()[sample : sample + 1] for p in (packing, other)]
        mine, its = (Digest(d.value[r], d.scale[r], d.tolerance) for d, r in zip((x, y), rows, strict=True))
        moved = changed(mine, its)
        if moved is None or moved.numel():
            return False
    return True


def changed(x: Digest | None, y: Digest | None) -> Tensor | None:
    """Return which rows changed; ``None`` if the shape did."""
    if x is None or y is None:
        return torch.zeros(0, dtype=torch.long) if x is y else None
    if x.value.shape != y.value.shape:
        return None
    scale = torch.maximum(x.scale, y.scale)
    different = (x.value - y.value).abs() > x.tolerance * scale
    return torch.nonzero(different | (x.value.isfinite() != y.value.isfinite())).flatten()


def order(axis: SampleAxis | None, rows: Tensor | None, x: Digest | None) -> str:
    """Return how an axis is ordered, by which rows changed with sample 0; "coupled" if others changed too."""
    if rows is None:
        return "coupled"
    if axis is None:
        return "coupled" if rows.numel() else "fits"
    in_first_block, strided = bool((rows < axis.rows).all()), bool((rows % 3 == 0).all())
    if axis.rows == 1:
        return "fits" if in_first_block else "coupled"
    if rows.numel() == 0 and x is not None:
        return _order_of_copies(x)
    if in_first_block and strided:
        return "unknown"
    return "sample first" if in_first_block else "row first" if strided else "coupled"


def _order_of_copies(x: Digest) -> str:
    """Return the order of rows that are the same for all three samples, as in ``position_bias.repeat(B, 1, 1)``."""
    blocks, scale = x.value.reshape(3, -1), x.scale.max()
    strides = x.value.reshape(-1, 3)
    same_blocks = bool(((blocks - blocks[:1]).abs() <= x.tolerance * scale).all())
    same_strides = bool(((strides - strides[:, :1]).abs() <= x.tolerance * scale).all())
    if same_blocks == same_strides:
        return "unknown"
    return "sample first" if same_blocks else "row first"
