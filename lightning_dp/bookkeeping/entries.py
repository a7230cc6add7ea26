"""Entries of the book: per-sample gradients that are not materialised unless that is cheaper.

Owns: what an entry is, and the materialised ones. Does not own: matrix products (``products``), look-ups (``tables``),
where an entry comes from (``rules``), which parameter it belongs to (``book``) or what several entries of one parameter
have to do with each other (``pairs``).

Shapes: B samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dp.bookkeeping.costs import Way
from lightning_dp.bookkeeping.precision import accurate

_LONG_ROW = 2**14
"""Elements that are summed in one piece."""

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
        """Return the squared norm of every sample's gradient, shape ``[B]``.

        It may have lost its digits where it is a small share of the square of `uncancelled`.
        """
        return norms_sq(self.dense())

    @property
    def num_terms(self) -> int:
        """How many terms the gradient of a sample is the sum of."""
        return 1

    def uncancelled(self) -> Tensor:
        """Return the norm that every sample's gradient would have if no terms cancelled, ``[B]``."""
        return self.norm_sq().sqrt()

    def uncancelled_of(self, i: int) -> float:
        """Return the same for one sample, in 64 bits."""
        return float(lengths(self.gradient_of(i)[None]))

    def gradient_of(self, i: int) -> Tensor:
        """Return the materialised gradient of sample ``i``, ``[*parameter.shape]``."""
        one = torch.zeros(self.num_samples, device=self.device)
        one[i] = 1
        return self.where(one != 0).weighted_sum(one)

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
    def shape(self) -> torch.Size:
        """The shape of ``g`` without its samples."""
        return self.g.shape[1:]

    def dense(self) -> Tensor:
        """Return ``g``."""
        return self.g

    def gradient_of(self, i: int) -> Tensor:
        """Return ``g[i]``."""
        return self.g[i]

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``sum_i weight[i] * g[i]``."""
        rows, weight = self.g.reshape(self.num_samples, -1), weight.to(self.g).view(1, -1)
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


def norms_sq(dense: Tensor) -> Tensor:
    """Return the squared norms of ``[B, *parameter.shape]``, each ``[B]``.

    Row by row: one long sum in float32 would lose digits, some per cent for the largest parameters. Rows of a few
    elements, as of a convolution's kernel, would take several times as long.
    """
    flat = dense.reshape(dense.shape[0], -1)
    if flat.shape[1] <= _LONG_ROW:
        return torch.linalg.vector_norm(flat, dim=1).square()
    rows = flat.view(flat.shape[0], -1, _row_length(dense.shape[1:]))
    pieces = rows.split(_LONG_ROW, -1) if rows.shape[-1] > _LONG_ROW else (rows,)
    parts = [torch.linalg.vector_norm(piece, dim=-1).square().sum(1) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def lengths(rows: Tensor) -> Tensor:
    """Return the norm of every sample's vector, in 64 bits: a product of norms may be large where one square is 0."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float64)


def _row_length(shape: Sequence[int]) -> int:
    """Return how many elements the last axis has, or the last few together if they are not too many."""
    length = 1
    for size in reversed(shape):
        if length > 1 and length * size > _LONG_ROW:
            break
        length *= size
    return max(1, length)


def masked(t: Tensor, keep: Tensor) -> Tensor:
    """Return samples first, with exact zeros for those outside the mask ``keep`` (shape ``[B]``)."""
    return torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros((), dtype=t.dtype, device=t.device))
