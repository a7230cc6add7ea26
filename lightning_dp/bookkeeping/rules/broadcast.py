"""A parameter repeated for every sample, such as a class token, added to it (a position table), or multiplied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.precision import accurate


def broadcast(operation: Operation, input: Tensor, *_size: Any, **_kwargs: Any) -> Recording | None:
    """``input.expand(B, ...)``: every sample adds its gradient over the axes that were repeated."""
    return _summed(operation, [(input, 1)])


def repeat(operation: Operation, input: Tensor, *sizes: Any) -> Recording | None:
    """``input.repeat(B, 1, ...)``, all other axes once."""
    file, axis, split = operation.filing(input), operation.layout.outputs[0], operation.split_output()
    counts = tuple(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
    shape = tuple(input.shape)
    once = len(counts) == len(shape) and all(count == 1 for count in counts[1:])
    if file is None or axis is None or not once or (axis.dim, axis.rows, axis.together) != (0, shape[0], None):
        return None

    def record(g: Tensor) -> None:
        file(Dense(split(g)))

    return record, []


def multiplication(operation: Operation, input: Any, other: Any) -> Recording | None:
    """``input * other``, one of them trained and the other carrying the samples: layer scale, RMS norms by hand."""
    trained, x = (input, other) if operation.filing(input) is not None else (other, input)
    file = operation.filing(trained)
    if file is None or not isinstance(x, Tensor) or operation.filing(x) is not None:
        return None
    output_axis, split = operation.layout.outputs[0], operation.split_output()
    if operation.axis(x) != output_axis or x.dim() < trained.dim():
        return None
    shape = tuple(trained.shape)

    def record(g: Tensor, x: Tensor) -> None:
        file(Dense(sum_to(split(accurate(g) * accurate(x)), shape), SUMMED))

    return record, [x]


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
