"""Look-ups in a table of V rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.tables import Rows
from lightning_dp.errors import UnsupportedModelError

_SIGNATURES = {F.embedding: inspect.signature(F.embedding), F.embedding_bag: inspect.signature(F.embedding_bag)}


def check_table(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before a look-up that has no private form runs; ``max_norm`` writes into the table, even without gradient.

    Raises:
        UnsupportedModelError: If one of the options is set.
    """
    if func not in _SIGNATURES:
        return
    given = _SIGNATURES[func].bind(*args, **kwargs).arguments
    options = {name: given.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse")}
    if options["max_norm"] is not None or options["scale_grad_by_freq"] or options["sparse"]:
        raise UnsupportedModelError(
            f"an embedding with {options}: max_norm writes into the table by what the batch contains, "
            "scale_grad_by_freq couples the samples and sparse gradients cannot carry noise. Use max_norm=None, "
            "scale_grad_by_freq=False, sparse=False, or freeze the table (requires_grad_(False))."
        )


def lookup(operation: Operation, input: Tensor, index: Any) -> Recording | None:
    """``input[i]`` or ``input[i, j]`` with integers of one shape that carry the samples, and input ``[V, *]``."""
    indices = list(index) if isinstance(index, tuple) else [index]
    file, output_axis = operation.filing(input), operation.layout.outputs[0]
    if file is None or not all(_is_lookup(i) and i.shape == indices[0].shape for i in indices):
        return None
    if any(operation.axis(i) != output_axis for i in indices):
        return None
    split, shape, count = operation.split_output(), tuple(input.shape), len(indices)

    def record(g: Tensor, *indices: Tensor) -> None:
        place = torch.zeros_like(indices[0])
        for size, i in zip(shape, indices, strict=False):
            place = place * size + i % size
        g = split(g)
        positions = split(place).flatten(1)
        file(Rows(positions, g.reshape(*positions.shape, -1), math.prod(shape[:count]), shape))

    return record, indices


def _is_lookup(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


def embedding(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **_options: Any,
) -> Recording | None:
    """``weight[input]`` with integers ``input`` of any rank and weight ``[V, d]``."""
    file, axis = operation.filing(weight), operation.axis(input)
    if file is None or axis is None or axis != operation.layout.outputs[0]:
        return None
    num_rows, of_index, of_rows = weight.shape[0], operation.positions(axis, 0), operation.positions(axis, 1)

    def record(g: Tensor, input: Tensor) -> None:
        index, g = of_index(input), of_rows(g)
        if padding_idx is not None:
            g = g * (index != padding_idx % num_rows)[..., None]
        file(Rows(index, g, num_rows))

    return record, [input]
