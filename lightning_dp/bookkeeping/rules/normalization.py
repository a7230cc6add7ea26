"""Affine normalisations: ``output = normalised(input) * weight + bias``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.axes import merge_rows
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
    """Group normalisation of ``[N, C, ...]``; weight and bias are ``[C]``."""

    def channels_last(t: Tensor) -> Tensor:
        return t.movedim(2, -1)  # the samples are split off in front: [B, rows, C, ...]

    def normalize(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, eps=eps)

    axis = operation.axis(input)
    if axis is None or axis.dim != 0:
        return None
    return _affine(operation, input, 1, weight, bias, normalize, channels_last)


def _over_last_axes(
    operation: Operation,
    input: Tensor,
    num_axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
) -> Recording | None:
    axis = operation.axis(input)
    if axis is None or axis.dim >= input.dim() - num_axes:
        return None
    return _affine(operation, input, num_axes, weight, bias, normalize, lambda t: t)


def _affine(
    operation: Operation,
    input: Tensor,
    feature_dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    features_last: Callable[[Tensor], Tensor],
) -> Recording | None:
    """File ``sum_t g * normalised`` for the weight and ``sum_t g`` for the bias."""
    file_weight, file_bias = operation.filing(weight), operation.filing(bias)
    split = operation.split_output()
    if operation.axis(input) != operation.layout.outputs[0]:
        return None

    def per_sample(t: Tensor) -> Tensor:
        return merge_rows(features_last(split(t)), feature_dims).sum(1)

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = accurate(g)
        if file_weight is not None and x is not None:
            file_weight(Dense(per_sample(normalize(accurate(x)) * g), SUMMED))
        if file_bias is not None:
            file_bias(Dense(per_sample(g), SUMMED))

    return record, [input] if file_weight is not None else []
