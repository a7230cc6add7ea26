"""Matrix products. Shapes: B samples, T positions of one sample, d inputs, p outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.axes import merge_rows
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
    split, split_output = operation.split(input), operation.split_output()
    axis, output_axis = operation.axis(input), operation.layout.outputs[0]
    in_last = (axis is not None and axis.dim == input.dim() - 1) or operation.filing(input) is not None
    if split is None or in_last or weight.dim() != 2 or axis != output_axis:
        return None
    if bias is not None and tuple(bias.shape) != (weight.shape[1 if transposed else 0],):
        return None  # a bias that is broadcast

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = merge_rows(split_output(g), 1)
        if file_weight is not None and x is not None:
            _file_outer(file_weight, merge_rows(split(x), 1), g, transposed)
        if file_bias is not None:
            file_bias(Dense(g.sum(1), SUMMED))

    return record, [input] if file_weight is not None else []


def _file_outer(file: File, a: Tensor, g: Tensor, transposed: bool) -> None:
    file(Outer(g, a) if transposed else Outer(a, g))
