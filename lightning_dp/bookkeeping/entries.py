"""Entries of the book: per-sample gradients that are not materialised unless that is cheaper.

Owns: the three forms of a per-sample gradient, their inner products and their weighted sums. Does not own: where an
entry comes from (``rules``) or which parameter it belongs to (``book``).

Book-keeping, arXiv 2210.00038: with layer inputs ``a`` and output gradients ``g``, the gradient of sample ``i`` is
``G_i = sum_t g_it a_it^T``, and ``||G_i||^2 = <A_i A_i^T, g_i g_i^T>`` (the "ghost norm") needs no ``G_i``.

Shapes: B samples, T positions of one sample, d inputs, p outputs, V rows of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_TRAFFIC = 60
"""How many multiply-adds one written-and-read element of a kept per-sample gradient is worth (measured on a CPU)."""

_MAX_KEPT = 2**28
"""Largest number of elements of a per-sample gradient that is kept (1 GiB in float32)."""

_FEW = 8
"""Up to so many positions, two entries of one parameter are joined."""

CANCELLATION = 1e-2
"""Below this share of its largest possible value, divided by the number of its terms, a ghost norm has lost too many
digits and is found again densely. (T terms of random direction cancel to a share of 1 / T, without any harm.)"""


MATERIALISED, SUMMED = "materialised, kept", "sum over positions"
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
    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return ``sum_i weight[i] * G_i``, shape ``[*parameter.shape]``, for weights of shape ``[B]``."""

    @abstractmethod
    def where(self, keep: Tensor) -> Entry:
        """Return the entry with the samples outside the mask ``keep`` (shape ``[B]``) replaced by exact zeros."""

    def norm_sq(self) -> Tensor:
        """Return the squared norm of every sample's gradient, shape ``[B]``."""
        return _per_sample(self.dense()).square().sum(1)


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

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return ``sum_i weight[i] * g[i]``."""
        return torch.tensordot(weight.to(self.g), self.g, 1)

    def where(self, keep: Tensor) -> Dense:
        """Return the masked entry."""
        return Dense(_masked(self.g, keep), self._method)


class Outer(Entry):
    """The gradient ``G_i[p, d] = sum_t g[i, t, p] * a[i, t, d]`` of a matrix product.

    Args:
        a: what multiplies the columns, ``[B, T, d]``.
        g: what multiplies the rows, ``[B, T, p]``.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = _same_dtype(a, g)
        self._kept: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(p, d)``."""
        return self.g.shape[-1], self.a.shape[-1]

    @property
    def method(self) -> str:
        """The way of `norm_sq`."""
        return "ghost norm" if self._ghost_is_cheaper() else MATERIALISED

    @property
    def held(self) -> tuple[Tensor, ...]:
        """``a``, ``g``, and the materialised gradients if they are kept."""
        return (self.a, self.g) if self._kept is None else (self.a, self.g, self._kept)

    def dense(self) -> Tensor:
        """Return ``g^T a``, and keep it for the weighted sum."""
        if self._kept is None:
            self._kept = torch.bmm(self.g.mT, self.a)
        return self._kept

    def norm_sq(self) -> Tensor:
        """Return the norms, through Gram matrices where that is cheaper."""
        if not self._ghost_is_cheaper():
            return super().norm_sq()
        norm_sq, most = _gram(self.a, self.g)
        # The terms of the Gram sum may cancel; a norm that is small only after cancellation is found densely.
        cancelled = (norm_sq < CANCELLATION / self.a.shape[1] * most).nonzero().flatten().tolist()
        for i in cancelled:
            norm_sq[i] = (self.g[i].t() @ self.a[i]).square().sum()
        return norm_sq

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return one matrix product over all samples and positions, or the sum of what was kept."""
        if self._kept is not None:
            return torch.tensordot(weight.to(self._kept), self._kept, 1)
        scale = weight.to(self.g)[:, None, None]
        a, g = (self.a, self.g * scale) if self.g.shape[-1] <= self.a.shape[-1] else (self.a * scale, self.g)
        return g.flatten(0, 1).t() @ a.flatten(0, 1)

    def where(self, keep: Tensor) -> Outer:
        """Return the masked entry."""
        return Outer(_masked(self.a, keep), _masked(self.g, keep))

    def transposed(self) -> Outer:
        """Return the entry of the transposed parameter."""
        return Outer(self.g, self.a)

    def _ghost_is_cheaper(self) -> bool:
        (batch, positions, d), p = self.a.shape, self.g.shape[-1]
        return batch * d * p > _MAX_KEPT or positions**2 * (d + p) <= _TRAFFIC * d * p


class Rows(Entry):
    """The gradient of a table of V rows, of which row ``index[i, t]`` receives ``g[i, t]``.

    Args:
        index: ``[B, T]``, integers in ``[0, V)``.
        g: ``[B, T, d]``.
        num_rows: V.
    """

    def __init__(self, index: Tensor, g: Tensor, num_rows: int) -> None:
        self.index, self.g, self.num_rows = index, accurate(g), num_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """``(V, d)``."""
        return self.num_rows, self.g.shape[-1]

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
        return zeros.index_add_(0, (self.index + first).flatten(), self.g.flatten(0, 1)).unflatten(0, (batch, -1))

    def norm_sq(self) -> Tensor:
        """Return the norms, without the tables unless they are smaller than ``g``."""
        if self.num_rows <= self.g.shape[1]:
            return super().norm_sq()
        same_row = self.index[:, :, None] == self.index[:, None, :]
        # Positions of one row are added before the square, so that no cancellation can hide in the Gram matrix.
        merged = torch.bmm(same_row.to(self.g.dtype), self.g).square().sum(-1)
        return (merged / same_row.sum(-1)).sum(1)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return one table."""
        g = (self.g * weight.to(self.g)[:, None, None]).flatten(0, 1)
        return g.new_zeros(self.num_rows, g.shape[-1]).index_add_(0, self.index.flatten(), g)

    def where(self, keep: Tensor) -> Rows:
        """Return the masked entry."""
        return Rows(self.index, _masked(self.g, keep), self.num_rows)


def inner(e: Entry, f: Entry) -> Tensor:
    """Return the inner product of two different entries of one parameter for every sample, shape ``[B]``."""
    if isinstance(e, Outer) and isinstance(f, Outer) and _pair_is_cheaper(e, f):
        return (torch.bmm(e.a, f.a.mT) * torch.bmm(e.g, f.g.mT)).sum((1, 2))
    if isinstance(e, Rows) and isinstance(f, Rows):
        return (torch.bmm(e.g, f.g.mT) * (e.index[:, :, None] == f.index[:, None, :])).sum((1, 2))
    if isinstance(e, Outer) and isinstance(f, Rows):
        e, f = f, e
    if isinstance(e, Rows) and isinstance(f, Outer):  # an embedding and an output head that share their weight
        index = e.index[:, None, :].expand(-1, f.g.shape[1], -1)
        return (torch.gather(f.g, 2, index) * torch.bmm(f.a, e.g.mT)).sum((1, 2))
    return (_per_sample(e.dense()) * _per_sample(f.dense())).sum(1)


def combined(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries of one parameter with the same sum: its matrix products, and its materialised gradients, as one.

    The k uses of a parameter, as in a recurrence, have k^2 inner products; as one product over all positions, none. Two
    long ones are left apart: joined they would be copied, and their inner product be computed twice.
    """
    if len(entries) == 1:
        return list(entries)
    products = [e for e in entries if type(e) is Outer]
    dense = [e for e in entries if type(e) is Dense]
    others = [e for e in entries if type(e) not in (Outer, Dense)]
    if len(products) > 2 or (len(products) > 1 and max(e.a.shape[1] for e in products) <= _FEW):
        products = [Outer(_joined(e.a for e in products), _joined(e.g for e in products))]
    if len(dense) > 1:
        dense = [Dense(torch.stack([e.g for e in dense]).sum(0))]
    return [*products, *others, *dense]


def accurate(t: Tensor) -> Tensor:
    """Return ``t`` without its graph, in float32 if it is stored in 16 bits: a norm summed in 16 bits is no bound."""
    t = t.detach()
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _per_sample(t: Tensor) -> Tensor:
    """Return ``[B, n]`` from ``[B, *shape]``."""
    return t.reshape(t.shape[0], -1)


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """Return one tensor ``[B, T_1 + T_2 + ..., d]``."""
    return torch.cat(list(tensors), 1)


def _same_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    a, g = accurate(a), accurate(g)
    dtype = torch.promote_types(a.dtype, g.dtype)
    return a.to(dtype), g.to(dtype)


def _pair_is_cheaper(e: Outer, f: Outer) -> bool:
    (batch, t, d), p = e.a.shape, e.g.shape[-1]
    return batch * d * p > _MAX_KEPT or t * f.a.shape[1] * (d + p) <= _TRAFFIC * d * p


def _gram(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared ghost norm and the largest value it could have without cancellation, each ``[B]``."""
    aa, gg = torch.bmm(a, a.mT), torch.bmm(g, g.mT)
    diagonal = aa.diagonal(dim1=1, dim2=2) * gg.diagonal(dim1=1, dim2=2)
    return (aa * gg).sum((1, 2)), diagonal.clamp(min=0).sqrt().sum(1).square()


def _masked(t: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros((), dtype=t.dtype, device=t.device))
