"""Entries of the book: per-sample gradients that are not materialised unless that is cheaper.

Owns: the three forms of a per-sample gradient, their norms and their weighted sums. Does not own: where an entry comes
from (``rules``), which parameter it belongs to (``book``), which way to a norm is the cheapest (``costs``) or what
several entries of one parameter have to do with each other (``pairs``).

Book-keeping, arXiv 2210.00038: with layer inputs ``a`` and output gradients ``g``, the gradient of sample ``i`` is
``G_i = sum_t g_it a_it^T``, and ``||G_i||^2 = <A_i A_i^T, g_i g_i^T>`` (the "ghost norm") needs no ``G_i``.

Shapes: B samples, T positions of one sample, d inputs, p outputs, V rows of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dp.bookkeeping.costs import HALVED, Shape, Way, cheapest, rates_of
from lightning_dp.bookkeeping.precision import accurate

CANCELLATION = 1e-2
"""Below this share of its largest possible value, divided by the number of its terms, a ghost norm has lost too many
digits and is found again densely. (T terms of random direction cancel to a share of 1 / T, without any harm.)"""

_LONG_ROW = 2**14
"""Elements that are summed in one piece."""

_FEW_SAMPLES = 8
"""Up to so many matrix products in the place of two copies."""

MATERIALISED, SUMMED = Way.KEPT.value, "sum over positions"
"""How norms of `Dense` entries are found, in a few words; rules may give others."""


class Entry(ABC):
    """The gradients of one parameter for each of B samples, from one use of the parameter."""

    g: Tensor
    """What came back through the graph, samples first."""

    @property
    def num_samples(self) -> int:
        """B."""
        return self.g.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the entry lies."""
        return self.g.device

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""

    @property
    def method(self) -> str:
        """How the norm is found, in a few words, to be shown."""
        return MATERIALISED

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that the entry holds now."""
        return (self.g,)

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the materialised gradients, shape ``[B, *parameter.shape]``."""

    @abstractmethod
    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``sum_i weight[i] * G_i``.

        Args:
            weight: ``[B]``.
            total: To be added to in place, ``[*parameter.shape]``; ``None`` for a new one.

        Returns:
            ``[*parameter.shape]``, contiguous.
        """

    @abstractmethod
    def where(self, keep: Tensor) -> Entry:
        """Return the entry with the samples outside the mask ``keep`` (shape ``[B]``) replaced by exact zeros."""

    def norm_sq(self) -> Tensor:
        """Return the squared norm of every sample's gradient, shape ``[B]``."""
        return norms_sq(self.dense())

    def settled(self, spare: int) -> Entry:
        """Return the entry in the form in which it is to be kept, with at most ``spare`` elements more."""
        return self

    @property
    def extra(self) -> int:
        """Elements that are held beyond what came back through the graph."""
        return 0


class Dense(Entry):
    """A materialised gradient ``g`` of shape ``[B, *parameter.shape]``: biases, norms, whatever has no rule.

    Args:
        g: The gradient.
        method: How it was found, in a few words.
    """

    def __init__(self, g: Tensor, method: str = MATERIALISED) -> None:
        self.g, self._method = accurate(g), method

    @property
    def method(self) -> str:
        """As given."""
        return self._method

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``g`` without its samples."""
        return tuple(self.g.shape[1:])

    def dense(self) -> Tensor:
        """Return ``g``."""
        return self.g

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``sum_i weight[i] * g[i]``."""
        rows, weight = self.g.reshape(self.num_samples, -1), weight.to(self.g)[None]
        if total is None:
            return (weight @ rows).view(self.shape)
        total.view(1, -1).addmm_(weight.to(total), rows.to(total))
        return total

    def where(self, keep: Tensor) -> Dense:
        """Return the masked entry."""
        return Dense(masked(self.g, keep), self._method)


class Kept(Dense):
    """What was materialised of a matrix product.

    Args:
        g: The gradients.
        extra: Elements that are held beyond those of the product.
    """

    def __init__(self, g: Tensor, extra: int) -> None:
        super().__init__(g)
        self._extra = extra

    @property
    def extra(self) -> int:
        """As given."""
        return self._extra


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

    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
        return self._shape

    @property
    def num_positions(self) -> int:
        """T."""
        return self.a.shape[1]

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
        shape = self._costs
        way = cheapest(shape, rates_of(self.a), spare)
        if way is Way.KEPT:
            return Kept(self.dense(), max(0, shape.extra))
        self._chosen = way
        return self

    def norm_sq(self) -> Tensor:
        """Return the norms, through Gram matrices or sample by sample."""
        if self._way is Way.TILED:
            return torch.cat([norms_sq(torch.bmm(g[None].mT, a[None])) for a, g in zip(self.a, self.g, strict=True)])
        norm_sq, most = _gram(self.a, self.g)
        # The terms of the Gram sum may cancel; a norm that is small only after cancellation is found densely.
        cancelled = (norm_sq < CANCELLATION / self.num_positions * most).nonzero().flatten().tolist()
        for i in cancelled:
            norm_sq[i] = (self.g[i].t() @ self.a[i]).square().sum()
        return norm_sq

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return one matrix product over all samples and positions, or one for each sample if that copies less."""
        scale = weight.to(self.g)[:, None, None]
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
        if self._chosen is None:
            self._chosen = cheapest(self._costs, rates_of(self.a), 0, kept=False)
        return self._chosen


class Rows(Entry):
    """The gradient of a table of V rows, of which row ``index[i, t]`` receives ``g[i, t]``.

    Args:
        index: ``[B, T]``, integers in ``[0, V)``.
        g: ``[B, T, d]``.
        num_rows: V.
        shape: Of the parameter; ``None`` for ``(V, d)``.
    """

    def __init__(self, index: Tensor, g: Tensor, num_rows: int, shape: tuple[int, ...] | None = None) -> None:
        self.index, self.g, self.num_rows = index, accurate(g), num_rows
        self._shape = (num_rows, self.g.shape[-1]) if shape is None else shape

    @property
    def shape(self) -> tuple[int, ...]:
        """As given."""
        return self._shape

    @property
    def method(self) -> str:
        """The way of `norm_sq`."""
        return "index rows"

    @property
    def held(self) -> tuple[Tensor, ...]:
        """``index`` and ``g``."""
        return self.index, self.g

    def dense(self) -> Tensor:
        """Return the tables, mostly zeros."""
        batch, _, d = self.g.shape
        first = torch.arange(batch, device=self.index.device)[:, None] * self.num_rows
        zeros = self.g.new_zeros(batch * self.num_rows, d)
        return zeros.index_add_(0, (self.index + first).flatten(), self.g.flatten(0, 1)).view(batch, *self._shape)

    def norm_sq(self) -> Tensor:
        """Return the norms, without the tables unless they are smaller than ``g``."""
        if self.num_rows <= self.g.shape[1]:
            return super().norm_sq()
        same_row = self.index[:, :, None] == self.index[:, None, :]
        # Positions of one row are added before the square, so that no cancellation can hide in the Gram matrix.
        merged = torch.bmm(same_row.to(self.g.dtype), self.g).square().sum(-1)
        return (merged / same_row.sum(-1)).sum(1)

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return one table."""
        g = (self.g * weight.to(self.g)[:, None, None]).flatten(0, 1)
        total = g.new_zeros(self._shape) if total is None else total
        total.view(self.num_rows, -1).index_add_(0, self.index.flatten(), g.to(total))
        return total

    def where(self, keep: Tensor) -> Rows:
        """Return the masked entry."""
        return Rows(self.index, masked(self.g, keep), self.num_rows, self._shape)


def norms_sq(dense: Tensor) -> Tensor:
    """Return the squared norms of ``[B, *parameter.shape]``, each ``[B]``.

    Row by row: one long sum in float32 would lose digits, some per cent for the largest parameters. Rows of a few
    elements, as of a convolution's kernel, would take several times as long.
    """
    rows = dense.reshape(dense.shape[0], -1, _row_length(dense.shape[1:]))
    pieces = rows.split(_LONG_ROW, -1) if rows.shape[-1] > _LONG_ROW else (rows,)
    parts = [torch.linalg.vector_norm(piece, dim=-1).square().sum(1) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _row_length(shape: Sequence[int]) -> int:
    """Return how many elements the last axis has, or the last few together if they are not too many."""
    length = 1
    for size in reversed(shape):
        if length > 1 and length * size > _LONG_ROW:
            break
        length *= size
    return max(1, length)


def _same_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    a, g = accurate(a), accurate(g)
    dtype = torch.promote_types(a.dtype, g.dtype)
    return a.to(dtype), g.to(dtype)


def _gram(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared ghost norm and the largest value it could have without cancellation, each ``[B]``.

    A Gram matrix is symmetric: of its quarters, one off the diagonal is left out and the other counted twice.
    """
    norm_sq, most = a.new_zeros(a.shape[0]), a.new_zeros(a.shape[0])
    size = -(-a.shape[1] // (2 if a.shape[1] >= HALVED else 1))
    for start in range(0, a.shape[1], size):
        stop = start + size
        aa, gg = (torch.bmm(t[:, start:stop], t[:, :stop].mT) for t in (a, g))
        diagonals = [t[:, :, start:].diagonal(dim1=1, dim2=2) for t in (aa, gg)]
        most += (diagonals[0] * diagonals[1]).clamp(min=0).sqrt().sum(1)
        product = aa.mul_(gg)
        norm_sq += product[:, :, start:].sum((1, 2)) + 2 * product[:, :, :start].sum((1, 2))
    return norm_sq, most.square()


def masked(t: Tensor, keep: Tensor) -> Tensor:
    """Return samples first, with exact zeros for those outside the mask ``keep`` (shape ``[B]``)."""
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros((), dtype=t.dtype, device=t.device))
