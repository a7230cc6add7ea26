"""A parameter repeated for every sample, such as a class token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.operation import Operation, Recording


def broadcast(operation: Operation, input: Tensor, *_size: Any, **_kwargs: Any) -> Recording | None:
    """``input.expand(B, ...)``: every sample adds its gradient over the axes that were repeated."""
    file, split, shape = operation.filing(input), operation.split_output(), tuple(input.shape)
    if file is None:
        return None

    def record(g: Tensor) -> None:
        g = split(g)
        g = g.flatten(1, g.dim() - len(shape)) if g.dim() > len(shape) + 1 else g.unsqueeze(1)
        # now [B, repetitions, *shape with what was 1 repeated]
        repeated = [k + 2 for k, size in enumerate(shape) if size == 1]
        g = g.sum(1, keepdim=True).sum(repeated, keepdim=True) if repeated else g.sum(1, keepdim=True)
        file(Dense(g[:, 0]))

    return record, []
