"""Convolutions of any rank, stride, padding, dilation and number of groups.

The gradient of a convolution's weight for each sample is one grouped convolution backward over all samples at once:
with the samples moved into the groups, the library's own weight-gradient kernel keeps them apart. Late layers, with few
positions and many channels, go through an unfolded input and the ghost norm instead, which is cheaper there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense, Entry, Outer, accurate
from lightning_dp.bookkeeping.operation import Operation, Recording

_UNFOLDED_IS_CHEAPER = 0.25
"""Unfold and use the ghost norm where T (p + d) is below this share of p d (measured on a CPU)."""


def convolution(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Recording | None:
    """Convolution of ``[N, C, *positions]`` with weight ``[p, C / groups, *kernel]``."""
    rank = weight.dim() - 2
    stride, dilation = _per_axis(stride, rank), _per_axis(dilation, rank)
    ahead: list[int] = []
    if isinstance(padding, str):
        padding, ahead = _string_padding(padding, weight.shape[2:], dilation)
    geometry = _Geometry(tuple(weight.shape), stride, _per_axis(padding, rank), dilation, groups)
    return _convolution(operation, input, weight, bias, geometry, ahead)


def transposed_convolution(
    operation: Operation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Recording | None:
    """Transposed convolution of ``[N, C, *positions]`` with weight ``[C, p / groups, *kernel]``."""
    rank = weight.dim() - 2
    geometry = _Geometry(
        tuple(weight.shape),
        _per_axis(stride, rank),
        _per_axis(padding, rank),
        _per_axis(dilation, rank),
        groups,
        True,
        _per_axis(output_padding, rank),
    )
    return _convolution(operation, input, weight, bias, geometry, [])


class _Geometry:
    """The arguments of a convolution other than its tensors."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        transposed: bool = False,
        output_padding: list[int] | None = None,
    ) -> None:
        self.weight_shape, self.groups, self.transposed = weight_shape, groups, transposed
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.output_padding = output_padding or [0] * len(stride)

    def entry(self, x: Tensor, g: Tensor) -> Entry:
        """Return the entry for inputs ``[B, C, *positions]`` and output gradients ``[B, p, *positions]``."""
        positions, p, d = math.prod(g.shape[2:]), self.weight_shape[0], math.prod(self.weight_shape[1:])
        small = positions * (p + d) <= _UNFOLDED_IS_CHEAPER * p * d
        if small and len(self.stride) == 2 and self.groups == 1 and not self.transposed:
            unfolded = F.unfold(x, self.weight_shape[2:], *map(tuple, (self.dilation, self.padding, self.stride)))
            return _Unfolded(unfolded.mT, g.flatten(2).mT, self.weight_shape)
        return Dense(self.weight_gradients(x, g))

    def weight_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the weight gradient of every sample, ``[B, *weight.shape]``."""
        batch, first = x.shape[0], self.weight_shape[0]
        stacked = x.new_empty(()).expand(batch * first, *self.weight_shape[1:])
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[2:]),
            x.reshape(1, -1, *x.shape[2:]),
            stacked,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            batch * self.groups,
            [False, True, False],
        )[1]
        return gradient.reshape(batch, *self.weight_shape)


class _Unfolded(Outer):
    """A matrix product whose parameter is the convolution's weight, of more than two axes."""

    def __init__(self, a: Tensor, g: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(a, g)
        self._shape = shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def dense(self) -> Tensor:
        return super().dense().reshape(-1, *self._shape)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        return super().weighted_sum(weight).reshape(self._shape)

    def where(self, keep: Tensor) -> Outer:
        masked = super().where(keep)
        return _Unfolded(masked.a, masked.g, self._shape)


def _convolution(
    operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, ahead: list[int]
) -> Recording | None:
    file_weight, file_bias = operation.filing(weight), operation.filing(bias)
    axis, split = operation.axis(input), operation.split_output()
    if axis is None or axis.dim != 0 or axis != operation.layout.outputs[0] or input.dim() != weight.dim():
        return None

    def record(g: Tensor, x: Tensor | None = None) -> None:
        g = accurate(g)
        if file_weight is not None and x is not None:
            x = F.pad(accurate(x), ahead) if ahead else accurate(x)
            file_weight(_merged(geometry, split(x), split(g)))
        if file_bias is not None:
            file_bias(Dense(split(g).transpose(1, 2).flatten(2).sum(2), SUMMED))

    return record, [input] if file_weight is not None else []


def _merged(geometry: _Geometry, x: Tensor, g: Tensor) -> Entry:
    """Return the entry for ``[B, rows, channels, *positions]``: the gradients of a sample's rows are added."""
    batch, rows = x.shape[:2]
    if rows == 1:
        return geometry.entry(x[:, 0], g[:, 0])
    gradients = geometry.weight_gradients(x.flatten(0, 1), g.flatten(0, 1))
    return Dense(gradients.unflatten(0, (batch, rows)).sum(1))


def _per_axis(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _string_padding(padding: str, kernel: tuple[int, ...], dilation: list[int]) -> tuple[int, list[int]]:
    """Return no padding in the convolution and the padding ahead of it (as F.pad wants it) for "same" or "valid"."""
    if padding == "valid":
        return 0, []
    ahead: list[int] = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        ahead += [total // 2, total - total // 2]
    return 0, ahead
