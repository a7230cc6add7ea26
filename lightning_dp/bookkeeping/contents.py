"""What the contents of two passes tell that differ in one sample: how an axis is ordered, what couples samples.

Owns: the comparison. Does not own: the passes (``observation``), or the orders that there are (``ordering``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping import ordering
from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.layout import Kind, Layout
from lightning_dp.bookkeeping.packing import Packing
from lightning_dp.bookkeeping.tracing import Use

Moved = tuple[Tensor, Tensor]
"""The rows of a gradient that changed with sample 0, and those that did not and are not zero."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""Relative change of a row's contents that may be rounding: equal shapes run equal kernels, so it is hardly any."""

COUPLED = (
    "a sample changes what the function computes for another sample of the batch, so no sample has a gradient of its "
    "own. Batch normalisation and any other statistic over the batch do this: use group or layer normalisation. "
    "So does sorting the samples of a batch by their length: leave that to pack_padded_sequence(enforce_sorted=False)."
)
UNKNOWN_ORDER = (
    "an axis holds several rows of every sample, and which rows belong to which sample cannot be told, because the "
    "first two samples do not differ there. Keep an axis of the samples alone where this parameter is used."
)


@dataclass(frozen=True)
class Digest:
    """One number for each row of a tensor along its sample axis (or one for all), and the size that it could have."""

    value: Tensor
    scale: Tensor
    tolerance: float


def digest(leaf: Any, axis: SampleAxis | None) -> Digest | None:
    """Return what tells whether the contents of a leaf changed, and in which rows along the sample axis."""
    if isinstance(leaf, bool | int | float):
        leaf = torch.tensor([leaf], dtype=torch.float64)
    if isinstance(leaf, slice):
        leaf = torch.tensor([n for n in (leaf.start, leaf.stop, leaf.step) if isinstance(n, int)], dtype=torch.float64)
    if not isinstance(leaf, Tensor):
        return None
    tolerance = _TOLERANCE.get(leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype, 0.0)
    rows = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
    rows = rows.as_subclass(Tensor)
    rows = torch.view_as_real(rows.resolve_conj()).double() if rows.is_complex() else rows.double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis.dim, 0).reshape(rows.shape[axis.dim], -1)
    weight = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return Digest((rows @ weight).cpu(), (rows.abs() @ weight).cpu(), tolerance)


def refined(
    use: Use, other: Use, gradients: Sequence[Moved | None] = (), third: Use | None = None
) -> tuple[Layout, bool]:
    """Refine a layout by a second pass, which differs in sample 0 of three.

    Args:
        use: The use in the first pass.
        other: The same use in the second.
        gradients: What changed of the gradient of every output; nothing before they are looked at.
        third: The same use in a third pass, which differs from the first in sample 1.

    Returns:
        The layout, and whether gradients would tell more.
    """
    layout = use.layout
    if layout.kind in (Kind.REFUSED, Kind.SHARED):
        return layout, False
    axes = (*(layout.leaves or (None,) * len(use.leaves)), *layout.outputs)
    pairs = zip((*use.leaves, *use.outputs), (*other.leaves, *other.outputs), axes, strict=True)
    if use.packing is not None and other.packing is not None:
        coupled = other.packing.problem(3) or not all(_fits_packed(use.packing, other.packing, *pair) for pair in pairs)
        return (replace(layout, kind=Kind.REFUSED, reason=COUPLED) if coupled else layout), False
    orders = [orders_of(axis, changed(x, y), x) for x, y, axis in pairs]
    if third is not None:
        again = zip((*use.leaves, *use.outputs), (*third.leaves, *third.outputs), axes, orders, strict=True)
        orders = [fits & orders_of(axis, changed(x, y), x, 1) for x, y, axis, fits in again]
    if not all(orders):
        return replace(layout, kind=Kind.REFUSED, reason=COUPLED), False
    vague = any(len(fits) > 1 for fits in orders)
    for k, moved in enumerate(gradients, len(orders) - len(layout.outputs)):
        axis = axes[k]
        if axis is not None and moved is not None:
            orders[k] = (orders[k] & ordering.by_gradient(axis, *moved)) or orders[k]
    settled = ordering.settle(axes, orders)
    if None in settled:
        return replace(layout, kind=Kind.REFUSED, reason=UNKNOWN_ORDER), vague
    turned = [axis and axis.ordered(order or 1) for axis, order in zip(axes, settled, strict=True)]
    outputs = turned[len(turned) - len(layout.outputs) :]
    return replace(layout, leaves=tuple(turned[: len(layout.leaves)]), outputs=tuple(outputs)), vague


def _fits_packed(packing: Packing, other: Packing, x: Digest | None, y: Digest | None, axis: SampleAxis | None) -> bool:
    """Whether the rows of samples 1 and 2 are the same in both passes; sample 0 may have another length."""
    if axis is None or x is None or y is None:
        return bool(orders_of(None, changed(x, y), x))
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
        return ordering.no_rows() if x is y else None
    if x.value.shape != y.value.shape:
        return None
    scale = torch.maximum(x.scale, y.scale)
    different = (x.value - y.value).abs() > x.tolerance * scale
    return torch.nonzero(different | (x.value.isfinite() != y.value.isfinite())).flatten()


def moved(x: Digest | None, y: Digest | None) -> Moved | None:
    """Return which rows of a gradient changed and which did not and are used; ``None`` if nothing changed."""
    rows = changed(x, y)
    if rows is None or x is None or not rows.numel():
        return None
    used = x.scale > x.tolerance * x.scale.max()
    used[rows] = False
    return rows, used.nonzero().flatten()


def orders_of(axis: SampleAxis | None, rows: Tensor | None, x: Digest | None, sample: int = 0) -> ordering.Orders:
    """Return the orders of an axis that fit to the rows that changed with a sample; none if other samples changed."""
    if rows is None or (axis is None and rows.numel()):
        return frozenset()
    if axis is None:
        return frozenset({1})
    if rows.numel() == 0 and x is not None:
        return ordering.of_copies(axis, x.value, x.tolerance * float(x.scale.max())) or ordering.fitting(axis, rows)
    return ordering.fitting(axis, rows, sample)
