"""Per-sample gradients of a matrix product, held as its inputs and output gradients.

Owns: their norms and their weighted sums. Does not own: which way to a norm is the cheapest (``costs``).

Book-keeping, arXiv 2210.00038: with layer inputs ``a`` and output gradients ``g``, the gradient of sample ``i`` is
``G_i = sum_t g_it a_it^T``, and ``||G_i||^2 = <A_i A_i^T, g_i g_i^T>`` (the "ghost norm") needs no ``G_i``.

Shapes: B samples, T positions of one sample, d inputs, p outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.bookkeeping.costs import Shape, Way, bands, cheapest, rates_of
from lightning_dp.bookkeeping.entries import Entry, Kept, lengths, masked, norms_sq
from lightning_dp.bookkeeping.precision import accurate

_TINY = 1e-30
"""Squares below it have lost digits to underflow."""

_FEW_SAMPLES = 8
"""Up to so many matrix products in the place of two copies."""


class Outer(Entry):
    """The gradient ``G_i[p, d] = sum_t g[i, t, p] * a[i, t, d]`` of a matrix product.

    Args:
        a: what multiplies the columns, ``[B, T, d]``.
        g: what multiplies the rows, ``[B, T, p]``.
        shape: Of the parameter; ``None`` for ``(p, d)``.
    """

    def __init__(self, a: Tensor, g: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.a, self.g = _same_dtype(a, g)
        self._shape = shape or (self.g.shape[-1], self.a.shape[-1])
        self._chosen: Way | None = None
        self._uncancelled: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
        return self._shape

    @property
    def num_positions(self) -> int:
        """T."""
        return self.a.shape[1]

    @property
    def num_terms(self) -> int:
        """T."""
        return self.num_positions

    @property
    def method(self) -> str:
        """The way of `norm_sq`."""
        return self._way.value

    @property
    def held(self) -> tuple[Tensor, ...]:
        """``a`` and ``g``."""
        return self.a, self.g

    def dense(self) -> Tensor:
        """Return ``g^T a``."""
        return torch.bmm(self.g.mT, self.a).view(-1, *self._shape)

    def settled(self, spare: int) -> Entry:
        """Return what is materialised, if that is the fastest; ``a`` and ``g`` need not be held then."""
        if self.num_positions == 1:  # nothing is cheaper than the norms of two vectors
            return self
        shape = self._costs
        way = cheapest(shape, rates_of(self.a), spare)
        if way is Way.KEPT:
            return Kept(self.dense(), max(0, shape.extra))
        self._chosen = way
        return self

    def norm_sq(self) -> Tensor:
        """Return the norms, through Gram matrices or sample by sample; of two vectors, the product of theirs."""
        if self.num_positions == 1:
            return (lengths(self.a) * lengths(self.g)).square().to(self.a.dtype)
        if self._way is Way.TILED:
            return torch.cat([norms_sq(torch.bmm(g[None].mT, a[None])) for a, g in zip(self.a, self.g, strict=True)])
        norm_sq, self._uncancelled = _gram(self.a, self.g, bands(self._costs, rates_of(self.a)))
        return norm_sq

    def uncancelled(self) -> Tensor:
        """Return ``sum_t |a_it| |g_it|``; infinity where Gram matrices underflow."""
        if self._uncancelled is None:
            inputs, outputs = (torch.linalg.vector_norm(t, dim=2) for t in (self.a, self.g))
            self._uncancelled = (inputs * outputs).sum(1)
        return self._uncancelled

    def uncancelled_of(self, i: int) -> float:
        """Return the same for one sample, in 64 bits."""
        return float((lengths(self.a[i]) * lengths(self.g[i])).sum())

    def gradient_of(self, i: int) -> Tensor:
        """Return ``g_i^T a_i``."""
        return (self.g[i].t() @ self.a[i]).view(self._shape)

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return one matrix product over all samples and positions, or one for each sample if that copies less."""
        scale = weight.to(self.g).view(-1, 1, 1)
        a, g = (self.a, self.g * scale) if self.g.shape[-1] <= self.a.shape[-1] else (self.a * scale, self.g)
        rows = g.shape[-1]
        if self._is_positions_last and self.num_samples <= _FEW_SAMPLES:
            found = a.new_zeros(self._shape) if total is None else total
            for one, other in zip(g, a, strict=True):
                found.view(rows, -1).addmm_(one.t().to(found), other.to(found))
            return found
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        if total is None:
            return (g.t() @ a).view(self._shape)
        total.view(rows, -1).addmm_(g.t().to(total), a.to(total))
        return total

    @property
    def _is_positions_last(self) -> bool:
        """Whether positions lie closest together, as in images: one matrix of all samples would be a copy."""
        return self.num_positions > 1 and self.a.stride(1) == self.g.stride(1) == 1 < self.a.stride(2)

    def where(self, keep: Tensor) -> Outer:
        """Return the masked entry."""
        return Outer(masked(self.a, keep), masked(self.g, keep), self._shape)

    def transposed(self) -> Outer:
        """Return the entry of the transposed parameter."""
        return Outer(self.g, self.a)

    @property
    def _costs(self) -> Shape:
        return Shape(self.num_samples, self.num_positions, self.a.shape[-1], self.g.shape[-1])

    @property
    def _way(self) -> Way:
        """The fastest way without keeping anything."""
        if self.num_positions == 1:
            return Way.GHOST
        if self._chosen is None:
            self._chosen = cheapest(self._costs, rates_of(self.a), 0, kept=False)
        return self._chosen


def _same_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    a, g = accurate(a), accurate(g)
    if a.dtype == g.dtype:
        return a, g
    dtype = torch.promote_types(a.dtype, g.dtype)
    return a.to(dtype), g.to(dtype)


def _gram(a: Tensor, g: Tensor, num_bands: int) -> tuple[Tensor, Tensor]:
    """Return the squared ghost norm, and the norm without cancellation, infinite where squares underflow, each ``[B]``.

    A Gram matrix is symmetric: of a band of its rows, what is before the diagonal counts twice for what is after it.
    """
    norm_sq, most = a.new_zeros(a.shape[0]), a.new_zeros(a.shape[0])
    largest: list[list[Tensor]] = [[], []]
    size = -(-a.shape[1] // num_bands)
    for start in range(0, a.shape[1], size):
        stop = start + size
        aa, gg = (torch.bmm(t[:, start:stop], t[:, :stop].mT) for t in (a, g))
        lengths_sq = [t[:, :, start:].diagonal(dim1=1, dim2=2).clamp(min=0) for t in (aa, gg)]
        for found, each in zip(largest, lengths_sq, strict=True):
            found.append(each.amax(1))
        most += (lengths_sq[0].sqrt() * lengths_sq[1].sqrt()).sum(1)
        product = aa.mul_(gg)
        norm_sq += product[:, :, start:].sum((1, 2))
        if start > 0:
            norm_sq += 2 * product[:, :, :start].sum((1, 2))
    tiny = torch.stack([torch.stack(found).amax(0) for found in largest]).amin(0) < _TINY
    return norm_sq, most.masked_fill(tiny, float("inf"))
