"""What the norms of a matrix product, or of a convolution, cost by how they are found.

Owns: the choice. Does not own: any of the ways (``products``, ``rules.convolution``).

The gradient of sample ``i`` is ``G_i = sum_t g_it a_it^T``. The clipped sum of all samples costs what ordinary training
pays for the gradient; the norms come on top:

| way | arithmetic | memory |
|---|---|---|
| ghost: ``<A_i A_i^T, g_i g_i^T>`` (arXiv 2210.00038) | ``B T^2 (p + d)`` | a, g and ``2 B T^2`` |
| kept: ``G_i`` is made when g comes back, a and g are let go, and the sum is one of B matrices | none | ``B p d`` |
| tiled: ``G_i`` is made for the norm, and dropped | ``B T p d`` | a, g and ``p d`` |

Which is fastest depends on the shape and on how much arithmetic a device does while it moves a number. That is measured
once. What no formula tells, as for the kernels of convolutions, is tried once for every shape.

Shapes: B samples, T positions of one sample, d inputs, p outputs.
"""

from __future__ import annotations

import enum
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.bookkeeping.precision import accurate

_REPEATS = 20
"""Many and short, so that one of them is likely to have the machine for itself."""

_SIZES = {"cpu": (256, 2**24, 2**19), "cuda": (4096, 2**26, 2**25)}
"""For the measurement: rows of a matrix; elements of a tensor, more than a cache holds; how many are moved at once."""

LEAST_BAND = 96
"""Positions in a band of a Gram matrix: products with less take as long."""

_MOST_BANDS = 8

WORTHWHILE = 0.1
"""The share of the time of a product that gradients must save if keeping them takes memory."""

_FASTEST: dict[Hashable, str] = {}


class Way(enum.Enum):
    """How the norms of a matrix product are found; the value says it in a few words."""

    GHOST = "ghost norm"
    KEPT = "materialised, kept"
    TILED = "materialised in tiles"


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Args:
        products: Multiply-adds per second in large matrix products.
        elements: Elements per second that are written, or read, in memory.
        call: Seconds that an operator takes however little it has to do.
        touch: Seconds more that writing an element takes for the first time, if what was freed is given back to the
            system, as the C library does between two batches.
    """

    products: float
    elements: float
    call: float = 0.0
    touch: float = 0.0


@dataclass(frozen=True)
class Shape:
    """Of a matrix product.

    Args:
        samples: B.
        positions: T.
        inputs: d.
        outputs: p.
    """

    samples: int
    positions: int
    inputs: int
    outputs: int

    @property
    def kept(self) -> int:
        """Elements of the gradients of all samples."""
        return self.samples * self.inputs * self.outputs

    @property
    def extra(self) -> int:
        """Elements that keeping them takes beyond the inputs and output gradients that are let go for them."""
        return self.kept - self.samples * self.positions * (self.inputs + self.outputs)


@functools.lru_cache(maxsize=4096)
def cheapest(shape: Shape, rates: Rates, spare: int, kept: bool = True) -> Way:
    """Return the fastest way that the memory allows.

    Args:
        shape: Of the product.
        rates: Of the device.
        spare: How many elements may be held in addition.
        kept: Whether the gradients may be kept at all.
    """
    seconds = _seconds(shape, rates)
    keeping = seconds.pop(Way.KEPT)
    way = min(seconds, key=seconds.__getitem__)
    # Memory is spent only where it saves what can be felt.
    least = WORTHWHILE * shape.kept * shape.positions / rates.products if shape.extra > 0 else 0.0
    return Way.KEPT if kept and shape.extra <= spare and keeping + least < seconds[way] else way


@functools.lru_cache(maxsize=4096)
def bands(shape: Shape, rates: Rates) -> int:
    """Return into how many bands of rows a Gram matrix is cut: it is symmetric, and of each the end may be left out."""
    most = min(_MOST_BANDS, max(1, shape.positions // LEAST_BAND))
    return min(range(1, most + 1), key=lambda count: _grams(shape, rates, count))


def _grams(shape: Shape, rates: Rates, count: int) -> float:
    """Return the seconds that both Gram matrices, in so many bands, and the sum of their products take."""
    share = (count + 1) / (2 * count)
    outputs = shape.samples * shape.positions**2
    work = share * outputs * ((shape.inputs + shape.outputs) / rates.products + 6 / rates.elements)
    return work + (2 + 10 * count) * rates.call


def _seconds(shape: Shape, rates: Rates) -> dict[Way, float]:
    """Return what each way costs beyond the clipped sum that every other way has to make."""
    b, t, d, p = shape.samples, shape.positions, shape.inputs, shape.outputs
    product, written_and_read = shape.kept * t / rates.products, 2 * shape.kept / rates.elements
    scaled = 2 * b * t * min(d, p) / rates.elements  # the weights of the sum are multiplied on the narrower side
    kept = written_and_read + shape.kept * (1 / rates.elements + rates.touch)  # read once more for the sum
    return {
        Way.GHOST: _grams(shape, rates, bands(shape, rates)) + scaled,
        Way.KEPT: kept + 5 * rates.call,
        Way.TILED: product + written_and_read + scaled + 5 * b * rates.call,
    }


def rates_of(t: Tensor) -> Rates:
    """Return the rates of the device and the type of a tensor, measured when first asked."""
    return _measured(t.device, t.dtype, torch.get_num_threads())


def measure(tensors: Iterable[Tensor]) -> None:
    """Measure the devices of tensors now.

    That takes more memory than many a model, for a moment: before a first pass it comes on top of nothing else.
    """
    for device, dtype in {(t.device, t.dtype) for t in tensors if t.device.type in _SIZES}:
        rates_of(accurate(torch.empty(0, device=device, dtype=dtype)))


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, num_threads: int) -> Rates:
    side, size, piece = _SIZES.get(device.type, _SIZES["cpu"])
    square = torch.ones(side, side, device=device, dtype=dtype)
    products = side**3 / _shortest(lambda: square @ square, device)
    elements, again = _moving(torch.ones(size, device=device, dtype=dtype), piece)
    # What an allocator has kept is not new to the system: of three tensors, one after the other, the fastest counts.
    first = min(_filling(torch.empty(size, device=device, dtype=dtype), piece) for _ in range(3))
    few = square[0, :1]
    return Rates(products, elements, _shortest(lambda: few * 2, device), max(0.0, first - again))


def _moving(long: Tensor, piece: int) -> tuple[float, float]:
    """Return the elements per second that are read or written, and the seconds that writing one takes."""
    # Piece by piece, each out of the memory and back: what comes next was pushed out of the cache long ago.
    pieces = itertools.cycle(long.split(piece))
    repeats = long.numel() // piece
    return 2 * piece / _shortest(lambda: next(pieces).mul_(1), long.device, repeats), _filling(long, piece)


def _filling(t: Tensor, piece: int) -> float:
    """Return the seconds that writing an element of a tensor takes."""
    pieces = t.split(piece)
    return statistics.median(_shortest(one.zero_, t.device, repeats=1) for one in pieces) / piece


def fastest(key: Hashable, ways: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Return the name of the fastest way, tried twice when first asked about ``key``.

    Args:
        key: Whatever the time depends on.
        ways: What to run, by name.
        device: Where it runs.
    """
    if len(ways) == 1:
        return next(iter(ways))
    if key not in _FASTEST:
        _FASTEST[key] = min(ways, key=lambda name: _shortest(ways[name], device, repeats=2))
    return _FASTEST[key]


def _shortest(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Return the seconds of the fastest of a few runs."""

    def once() -> float:
        _wait_for(device)
        start = time.perf_counter()
        work()
        _wait_for(device)
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def _wait_for(device: torch.device) -> None:
    getattr(torch, device.type).synchronize()
