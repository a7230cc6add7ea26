"""Several entries of one parameter, from several uses of it.

Owns: their inner products, and which of them are better held as one. Does not own: a single entry (``entries``).

The gradient of a parameter that is used twice is the sum of two, whose norm has a cross term:
``||e + f||^2 = ||e||^2 + 2 <e, f> + ||f||^2``, for each sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_dp.bookkeeping.costs import Shape, Way, cheapest, rates_of
from lightning_dp.bookkeeping.entries import Dense, Entry, Kept
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.bookkeeping.tables import Rows

FEW = 8
"""Up to so many positions, two matrix products of one parameter are joined, and until then neither is materialised."""


def inner(e: Entry, f: Entry) -> Tensor:
    """Return the inner product of two different entries of one parameter for every sample, shape ``[B]``."""
    if isinstance(e, Outer) and isinstance(f, Outer) and _pair_is_cheaper(e, f):
        return (torch.bmm(e.a, f.a.mT) * torch.bmm(e.g, f.g.mT)).sum((1, 2))
    if isinstance(e, Rows) and isinstance(f, Rows):
        return (torch.bmm(e.g, f.g.mT) * (e.index[:, :, None] == f.index[:, None, :])).sum((1, 2))
    if isinstance(f, Rows):
        e, f = f, e
    if isinstance(e, Rows):  # an embedding and an output head that share their weight
        return _with_rows(e, f)
    return (e.dense().flatten(1) * f.dense().flatten(1)).sum(1)


def _with_rows(rows: Rows, other: Entry) -> Tensor:
    """Return the inner product with the rows of ``other`` that were looked up."""
    if isinstance(other, Outer):
        index = rows.index[:, None, :].expand(-1, other.num_positions, -1)
        return (torch.gather(other.g, 2, index) * torch.bmm(other.a, rows.g.mT)).sum((1, 2))
    table = other.dense().reshape(rows.num_samples, rows.num_rows, -1)
    sample = torch.arange(rows.num_samples, device=rows.device)[:, None]
    return (table[sample, rows.index] * rows.g).sum((1, 2))


def combined(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries of one parameter with the same sum: its matrix products, and its materialised gradients, as one.

    The k uses of a parameter, as in a recurrence, have k^2 inner products; as one product over all positions, none. Two
    long ones are left apart: joined they would be copied, and their inner product be computed twice.
    """
    if len(entries) == 1:
        return list(entries)
    products = [e for e in entries if type(e) is Outer]
    dense = [e for e in entries if isinstance(e, Dense)]
    others = [e for e in entries if type(e) is not Outer and not isinstance(e, Dense)]
    if len(products) > 2 or (len(products) > 1 and max(e.num_positions for e in products) <= FEW):
        products = [Outer(_joined(e.a for e in products), _joined(e.g for e in products), products[0].shape)]
    return [*products, *others, *([added(dense)] if dense else [])]


def added(entries: Sequence[Dense]) -> Dense:
    """Return materialised gradients of one parameter as one; what only the book holds is added to in place."""
    first, *others = sorted(entries, key=lambda e: not isinstance(e, Kept))
    if not others:
        return first
    if not isinstance(first, Kept):
        return Dense(torch.stack([e.g for e in entries]).sum(0))
    for e in others:
        first.g.add_(e.g)
    return first


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """Return one tensor ``[B, T_1 + T_2 + ..., d]``."""
    return torch.cat(list(tensors), 1)


def _pair_is_cheaper(e: Outer, f: Outer) -> bool:
    """Whether Gram matrices are cheaper than both gradients; as for a single product of as many positions."""
    positions = round((e.num_positions * f.num_positions) ** 0.5)
    shape = Shape(e.num_samples, positions, e.a.shape[-1], e.g.shape[-1])
    return cheapest(shape, rates_of(e.a), 0, kept=False) is Way.GHOST
