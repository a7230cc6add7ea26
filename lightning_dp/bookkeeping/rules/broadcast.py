"""A parameter repeated for every sample, such as a class token, or added to every sample, such as a position table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense, accurate
from lightning_dp.bookkeeping.operation import Operation, Recording


def broadcast(operation: Operation, input: Tensor, *_size: Any, **_kwargs: Any) -> Recording | None:
    """``input.expand(B, ...)``: every sample adds its gradient over the axes that were repeated."""
    return _summed(operation, [(input, 1)])


def addition(operation: Operation, input: Any, other: Any, *, alpha: float = 1) -> Recording | None:
    """``input + alpha * other``; nothing of the forward pass is saved, so that either may be overwritten."""
    return _summed(operation, [(input, 1), (other, alpha)])


def subtraction(operation: Operation, input: Any, other: Any, *, alpha: float = 1) -> Recording | None:
    """``input - alpha * other``."""
    return _summed(operation, [(input, 1), (other, -alpha)])


def reversed_subtraction(operation: Operation, input: Any, other: Any) -> Recording | None:
    """``other - input``, as Python calls it: ``input.__rsub__(other)``."""
    return _summed(operation, [(input, -1), (other, 1)])


def _summed(operation: Operation, terms: list[tuple[Any, float]]) -> Recording | None:
    """File the output gradient, times a factor, for every trained term, summed over the axes that were repeated."""
    split = operation.split_output()
    filed = [(operation.filing(t), tuple(t.shape), factor) for t, factor in terms if isinstance(t, Tensor)]

    def record(g: Tensor) -> None:
        g = split(accurate(g))
        for file, shape, factor in filed:
            if file is not None:
                file(Dense(sum_to(g, shape) * factor, SUMMED))

    return record, []


def sum_to(g: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``[B, *shape]`` from a gradient ``[B, *broadcast shape]``."""
    ahead = g.dim() - 1 - len(shape)
    g = g.sum(tuple(range(1, 1 + ahead))) if ahead else g
    repeated = tuple(k for k, size in enumerate(shape, 1) if size == 1 and g.shape[k] != 1)
    return g.sum(repeated, keepdim=True) if repeated else g
