"""Convolutions of any rank, stride, padding, dilation and number of groups.

The gradient of a convolution's weight for each sample is one grouped convolution backward over all samples at once:
with the samples moved into the groups, the library's own weight-gradient kernel keeps them apart. Or it is one call of
that kernel for each sample. Late layers, with few positions and many channels, go through an unfolded input and the
ghost norm instead. Which is the fastest no formula tells: it is tried. A convolution of kernel size 1 is an ordinary
matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.costs import fastest
from lightning_dp.bookkeeping.entries import SUMMED, Dense, Entry, Kept, masked
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.precision import accurate
from lightning_dp.bookkeeping.products import Outer

_UNFOLDED_IS_TRIED = 2.0
"""Unfold and use the ghost norm only where T (p + d) is below this multiple of p d: elsewhere it is far too slow, and
needs far more memory, to be tried."""


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
        self.key = (*weight_shape, groups, transposed, *stride, *padding, *dilation, *self.output_padding)

    def entry(self, x: Tensor, g: Tensor) -> Entry:
        """Return the entry for inputs ``[B, C, *positions]`` and output gradients ``[B, p, *positions]``."""
        pointwise = math.prod(self.weight_shape[2:]) == 1 and self.groups == 1 and not any(self.padding)
        if pointwise and not self.transposed:
            everywhere = [slice(None)] * 2 + [slice(None, None, step) for step in self.stride]
            x = x[tuple(everywhere)]
            return Outer(x.flatten(2).mT, g.flatten(2).mT, self.weight_shape)
        return Convolved(x, g, self)

    def can_unfold(self) -> bool:
        """Whether the input can be unfolded into that of a matrix product."""
        return len(self.stride) == 2 and self.groups == 1 and not self.transposed

    def unfolded(self, x: Tensor, g: Tensor) -> Outer:
        """Return the entry as that of a matrix product."""
        unfolded = F.unfold(x, self.weight_shape[2:], *map(tuple, (self.dilation, self.padding, self.stride)))
        return Outer(unfolded.mT, g.flatten(2).mT, self.weight_shape)

    def weight_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the weight gradient of every sample, ``[B, *weight.shape]``, by one call."""
        batch, first = x.shape[0], self.weight_shape[0]
        stacked = x.new_empty(()).expand(batch * first, *self.weight_shape[1:])
        gradient = self._backward(
            g.reshape(1, -1, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:]), stacked, batch * self.groups
        )
        return gradient.reshape(batch, *self.weight_shape)

    def one_by_one(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the same, by one call for each sample."""
        return torch.stack([self.weight_gradient(x[i : i + 1], g[i : i + 1]) for i in range(x.shape[0])])

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the weight gradient of all samples together."""
        return self._backward(g, x, x.new_empty(()).expand(self.weight_shape), self.groups)

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            groups,
            [False, True, False],
        )[1]
        return gradient


class Convolved(Entry):
    """The gradient of a convolution's weight, before it is known how its norm is found.

    Args:
        x: Inputs ``[B, C, *positions]``.
        g: Output gradients ``[B, p, *positions]``.
        geometry: Of the convolution.
    """

    def __init__(self, x: Tensor, g: Tensor, geometry: _Geometry) -> None:
        self.x, self.g, self._geometry = x, g, geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self._geometry.weight_shape

    @property
    def held(self) -> tuple[Tensor, ...]:
        """``x`` and ``g``."""
        return self.x, self.g

    def dense(self) -> Tensor:
        """Return the gradients, by one call of the library."""
        return self._geometry.weight_gradients(self.x, self.g)

    def weighted_sum(self, weight: Tensor, total: Tensor | None = None) -> Tensor:
        """Return the gradient of the weighted samples, as ordinary training finds it."""
        scale = weight.to(self.g).view(-1, *[1] * (self.g.dim() - 1))
        found = self._geometry.weight_gradient(self.x, self.g * scale).contiguous()
        return found if total is None else total.add_(found)

    def where(self, keep: Tensor) -> Convolved:
        """Return the masked entry."""
        return Convolved(masked(self.x, keep), masked(self.g, keep), self._geometry)

    def settled(self, spare: int) -> Entry:
        """Return the entry in the form whose norms and sum are found fastest."""
        extra = self.num_samples * math.prod(self.shape) - self.x.numel() - self.g.numel()
        kept: dict[str, Callable[[], Entry]] = {
            "grouped": lambda: Kept(self.dense(), max(0, extra)),
            "one by one": lambda: Kept(self._geometry.one_by_one(self.x, self.g), max(0, extra)),
        }
        ways = kept if extra <= spare or not self._few_positions() else {}
        if self._few_positions():
            ways = {**ways, "unfolded": lambda: self._geometry.unfolded(self.x, self.g)}
        return ways[fastest(self._kind(), {name: partial(_clipped, way) for name, way in ways.items()}, self.device)]()

    def _few_positions(self) -> bool:
        positions, p, d = math.prod(self.g.shape[2:]), self.shape[0], math.prod(self.shape[1:])
        return self._geometry.can_unfold() and positions * (p + d) <= _UNFOLDED_IS_TRIED * p * d

    def _kind(self) -> Hashable:
        """What the time depends on; of the number of samples only its size."""
        sizes = self.num_samples.bit_length(), tuple(self.x.shape[1:]), tuple(self.g.shape[1:])
        return *sizes, self._geometry.key, self.x.dtype, self.device, torch.get_num_threads()


def _clipped(way: Callable[[], Entry]) -> None:
    """Do what is done with an entry."""
    entry = way()
    entry.weighted_sum(entry.norm_sq())


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
