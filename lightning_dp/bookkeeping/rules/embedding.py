"""Look-ups in a table of V rows."""

from __future__ import annotations

from torch import Tensor

from lightning_dp.bookkeeping.axes import merge_rows
from lightning_dp.bookkeeping.entries import Rows
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.errors import UnsupportedModelError


def embedding(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Recording | None:
    """``weight[input]`` with integers ``input`` of any rank and weight ``[V, d]``."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedModelError(
            f"an embedding with max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq}, sparse={sparse}: "
            "max_norm writes into the table by what the batch contains, scale_grad_by_freq couples the samples and "
            "sparse gradients cannot carry noise. Use max_norm=None, scale_grad_by_freq=False, sparse=False."
        )
    file, split, split_output = operation.filing(weight), operation.split(input), operation.split_output()
    if file is None or split is None:
        return None
    num_rows = weight.shape[0]

    def record(g: Tensor, input: Tensor) -> None:
        index, g = merge_rows(split(input), 0), merge_rows(split_output(g), 1)
        if padding_idx is not None:
            g = g * (index != padding_idx % num_rows)[..., None]
        file(Rows(index, g, num_rows))

    return record, [input]
