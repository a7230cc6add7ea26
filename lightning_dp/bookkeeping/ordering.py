"""How an axis that holds several rows of every sample is ordered, told by the rows that changed with one sample.

Owns: which orders fit, and the choice among them. Does not own: what changed (``observation``).

An order is the number of rows of one sample that follow each other: see ``SampleAxis.together``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis

Orders = frozenset[int]

_SAMPLES = 3
"""How many samples the observed batches have; the first one changes, or the second."""


def fitting(axis: SampleAxis, changed: Tensor, sample: int = 0) -> Orders:
    """Return the orders in which only rows of one sample changed; none if another sample changed, too."""
    return frozenset(k for k in _divisors(axis.rows) if bool((changed // k % _SAMPLES == sample).all()))


def by_gradient(axis: SampleAxis, changed: Tensor, same: Tensor) -> Orders:
    """Return the orders that fit to the gradient of an output, by the rows of it that changed and those that did not.

    Rows that are used at all have another gradient for another sample, as a rule: so orders in which all used rows of
    the first sample changed are preferred.
    """
    fits = fitting(axis, changed)
    return frozenset(k for k in fits if not bool((same // k % _SAMPLES == 0).any())) or fits


def of_copies(axis: SampleAxis, rows: Tensor, tolerance: float) -> Orders:
    """Return the orders in which the rows are the same for all samples, as in ``position_bias.repeat(B, 1, 1)``."""
    fits = []
    for k in _divisors(axis.rows):
        samples = rows.reshape(-1, _SAMPLES, k).movedim(1, 0)
        if bool(((samples - samples[:1]).abs() <= tolerance).all()):
            fits.append(k)
    return frozenset(fits)


def settle(axes: Sequence[SampleAxis | None], orders: Sequence[Orders]) -> list[int | None]:
    """Return one order for every axis, ``None`` where it cannot be told.

    The tensors of one function are ordered alike: an axis that leaves several orders open takes that of the others.
    """
    held = [(axis, fits) for axis, fits in zip(axes, orders, strict=True) if axis is not None and axis.rows > 1]
    return [_settled(axis, fits, held) if axis is not None else 1 for axis, fits in zip(axes, orders, strict=True)]


def _settled(axis: SampleAxis, fits: Orders, held: Sequence[tuple[SampleAxis, Orders]]) -> int | None:
    if len(fits) == 1:
        return next(iter(fits))
    known = {next(iter(o)) for a, o in held if a.rows == axis.rows and len(o) == 1}
    shared = fits.intersection(*(o for a, o in held if a.rows == axis.rows)) if not known else fits & known
    if len(shared) == 1:
        return next(iter(shared))
    kinds = {_kind(a, next(iter(o))) for a, o in held if len(o) == 1}
    for kind, order in (("sample first", axis.rows), ("row first", 1)):
        if kinds == {kind} and order in fits:
            return order
    # Rows may be the same in both samples by chance, so that finer orders fit as well: they are rare.
    plain = fits & {1, axis.rows}
    return next(iter(plain)) if len(plain) == 1 and not kinds else None


def _kind(axis: SampleAxis, order: int) -> str:
    return "sample first" if order == axis.rows else "row first" if order == 1 else "between"


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def no_rows() -> Tensor:
    """Return the rows of a tensor that did not change."""
    return torch.zeros(0, dtype=torch.long)
