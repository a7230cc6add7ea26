"""Affine normalisations: ``output = normalised(input) * weight + bias``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.precision import accurate


def layer_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Recording | None:
    """Layer normalisation over the trailing axes."""
    shape = tuple(normalized_shape)
    return _over_last_axes(operation, input, len(shape), weight, bias, lambda x: F.layer_norm(x, shape, eps=eps))


def rms_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Recording | None:
    """Root-mean-square normalisation over the trailing axes."""
    shape = tuple(normalized_shape)
    return _over_last_axes(operation, input, len(shape), weight, None, lambda x: F.rms_norm(x, shape, eps=eps))


def group_norm(
    operation: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Recording | None:
    """Group normalisation of ``[N, C, ...]``; weight and bias are ``[C]``.

    To the library's own kernel, all samples are the groups of one: it then keeps their gradients apart.
    """
    file_weight, file_bias = operation.filing(weight), operation.filing(bias)
    axis, split = operation.axis(input), operation.split_output()
    if axis is None or axis.dim != 0 or axis != operation.layout.outputs[0]:
        return None

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = accurate(g)
        if x is None:
            sums: tuple[Tensor, ...] = (g.flatten(2).sum(2) if g.dim() > 2 else g,)
        else:
            sums = _group_norm_sums(accurate(x), g, num_groups, eps)
        for file, rows in zip((file_bias, file_weight), sums, strict=False):
            if file is not None:
                file(Dense(split(rows).sum(1), SUMMED))

    return record, [input] if file_weight is not None else []


def _group_norm_sums(x: Tensor, g: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of bias and weight for every row, ``[N, C]`` each."""
    rows, channels = x.shape[:2]
    positions, x, g = x[0, 0].numel(), x.contiguous(), g.to(x.dtype).contiguous()
    _, mean, rstd = torch.native_group_norm(x, None, None, rows, channels, positions, num_groups, eps)
    groups = rows * num_groups
    one = [t.view(1, rows * channels, *t.shape[2:]) for t in (g, x)] + [t.view(1, groups) for t in (mean, rstd)]
    # The weight does not matter for its own gradient, but torch 2.6 raises without one.
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        *one, x.new_ones(rows * channels), 1, rows * channels, positions, groups, [False, True, True]
    )
    return bias.view(rows, channels), weight.view(rows, channels)


def _over_last_axes(
    operation: Operation,
    input: Tensor,
    feature_dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
) -> Recording | None:
    """File ``sum_t g * normalised`` for the weight and ``sum_t g`` for the bias."""
    file_weight, file_bias = operation.filing(weight), operation.filing(bias)
    axis = operation.axis(input)
    if axis is None or axis.dim >= input.dim() - feature_dims or axis != operation.layout.outputs[0]:
        return None
    positions = operation.positions(axis, feature_dims)

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = accurate(g)
        if file_weight is not None and x is not None:
            file_weight(Dense(positions(normalize(accurate(x)).mul_(g)).sum(1), SUMMED))
        if file_bias is not None:
            file_bias(Dense(positions(g).sum(1), SUMMED))

    return record, [input] if file_weight is not None else []
