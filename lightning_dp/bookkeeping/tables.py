"""Per-sample gradients of a table of which samples use rows, held as the rows' numbers and gradients.

Owns: their norms and their weighted sums.

Shapes: B samples, T positions of one sample, V rows of the table, d columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.bookkeeping.entries import Entry, lengths, masked
from lightning_dp.bookkeeping.precision import accurate


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

    @property
    def num_terms(self) -> int:
        """T."""
        return self.index.shape[1]

    def uncancelled(self) -> Tensor:
        """Return what the norm would be if the positions of one row of the table did not cancel."""
        own = torch.linalg.vector_norm(self.g, dim=-1)
        rows = own.new_zeros(own.shape[0], self.num_rows).scatter_add_(1, self.index, own)
        return torch.linalg.vector_norm(rows, dim=1)

    def uncancelled_of(self, i: int) -> float:
        """Return the sum of the norms of all positions of a sample, in 64 bits."""
        return float(lengths(self.g[i]).sum())

    def gradient_of(self, i: int) -> Tensor:
        """Return the table of one sample."""
        table = self.g.new_zeros(self.num_rows, self.g.shape[-1])
        return table.index_add_(0, self.index[i], self.g[i]).view(self._shape)

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return one table."""
        g = (self.g * weight.to(self.g)[:, None, None]).flatten(0, 1)
        total = g.new_zeros(self._shape) if total is None else total
        total.view(self.num_rows, -1).index_add_(0, self.index.flatten(), g.to(total))
        return total

    def where(self, keep: Tensor) -> Rows:
        """Return the masked entry."""
        return Rows(self.index, masked(self.g, keep), self.num_rows, self._shape)
