"""Matrix products. Shapes: B samples, T positions of one sample, d inputs, p outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense
from lightning_dp.bookkeeping.operation import File, Operation, Recording
from lightning_dp.bookkeeping.products import Outer


def linear(operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Recording | None:
    """``input @ weight.T + bias`` with input ``[..., d]``, weight ``[p, d]``."""
    return _product(operation, input, weight, bias, transposed=False)


def addmm(operation: Operation, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Recording | None:
    """``input + mat1 @ mat2`` with mat1 ``[T, d]``, mat2 ``[d, p]``."""
    if any(scale != 1 for scale in scales.values()):
        return None
    return _product(operation, mat1, mat2, input, transposed=True)


def matmul(operation: Operation, input: Tensor, other: Tensor) -> Recording | None:
    """``input @ other`` with input ``[..., d]`` carrying the samples and other ``[d, p]`` trained."""
    return _product(operation, input, other, None, transposed=True)


def _product(
    operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Recording | None:
    """File the product of ``input`` with ``weight`` ``[p, d]``, or ``[d, p]`` if transposed."""
    file_weight, file_bias = operation.filing(weight), operation.filing(bias)
    axis, file_input = operation.axis(input), operation.filing(input)
    if axis is None or axis != operation.layout.outputs[0] or axis.dim == input.dim() - 1:
        return None
    if file_input is not None or weight.dim() != 2:
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[1 if transposed else 0],):
        return None  # a bias that is broadcast

    positions = operation.positions(axis, 1)

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = positions(g)
        if file_weight is not None and x is not None:
            _file_outer(file_weight, positions(x), g, transposed)
        if file_bias is not None:
            file_bias(Dense(g.sum(1), SUMMED))

    return record, [input] if file_weight is not None else []


def _file_outer(file: File, a: Tensor, g: Tensor, transposed: bool) -> None:
    file(Outer(g, a) if transposed else Outer(a, g))
