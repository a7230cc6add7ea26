"""Gaussian noise from a secret generator.

Owns: the generators and the precision of the draw. Does not own: the scale of the noise (``mechanism``).

Guarantee: the seed comes from the operating system, is kept nowhere else and is independent of ``seed_everything``, so
that nobody who knows a run's configuration or checkpoint can subtract its noise. Draws are in float64, on the CPU of 53
random bits: they reach 8.57 standard deviations, which a normal value exceeds with probability 1e-17. A float32 draw of
torch's is made of 24-bit uniforms there and never exceeds 5.77. Sums are rounded after the noise, to float32 by 29 of
53 digits: by those, the values that noise can take would tell of what it was added to (arXiv 2112.05307).
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

_DRAWN = {"cpu": 2**18, "cuda": 2**24}
"""Elements that are drawn at once: float64 values of a whole model would take more memory than the model. On the CPU
they stay in the cache until they are added, and are enough for threads of Python not to wait for each other."""

_SHORT = 2**15
"""Elements of a piece on the CPU: of longer ones, each thread would give parts to further threads of torch's own."""

Draw = Callable[[int, float], Tensor]
"""Returns so many normal values of a standard deviation, in float64."""


class SecretRandom:
    """Random numbers for one process, from generators seeded with at least 63 bits by the operating system.

    On the CPU they are NumPy's, whose seed has 128 bits: torch's generator there keeps 32 bits of a seed only, few
    enough to try them all. A copy, a pickle or a forked process begins anew, so that nothing is drawn twice.
    """

    def __init__(self) -> None:
        self._process, self._cpu = os.getpid(), _generator()
        self._others: list[np.random.Generator] = []
        self._devices: dict[torch.device, torch.Generator] = {}

    def __reduce__(self) -> tuple[type[SecretRandom], tuple[()]]:
        return type(self), ()

    def uniform(self, size: int) -> Tensor:
        """Return ``size`` independent values in [0, 1), in float64 on the CPU."""
        return torch.from_numpy(self._here().random(size))

    def add_normal(self, totals: Iterable[Tensor], std: float, divisor: float = 1.0) -> None:
        """Replace every ``total`` by ``(total + noise) / divisor``, computed in float64.

        Args:
            totals: Contiguous, of any shapes, devices and real dtypes.
            std: Standard deviation of the independent noise of every element.
            divisor: Divides the sums.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for total in totals:
            by_device.setdefault(total.device, []).append(total if total.dim() == 1 else total.view(-1))
        for device, flat in by_device.items():
            most = _DRAWN.get(device.type, _DRAWN["cuda"])
            size = _SHORT if device.type == "cpu" else most
            pieces = (piece for t in flat for piece in (t.split(size) if t.numel() > size else (t,)))
            batches = list(_batches(pieces, most))
            draws = self._draws(device, len(batches))
            work = [
                partial(_add, batches[i :: len(draws)], std, divisor, draw)  # every thread has a generator of its own
                for i, draw in enumerate(draws)
            ]
            if len(work) == 1:
                work[0]()
            else:
                with ThreadPoolExecutor(len(work)) as threads:
                    list(threads.map(lambda one: one(), work))

    def _draws(self, device: torch.device, most: int) -> list[Draw]:
        """Return what draws normal values, by independent generators that can run side by side."""
        if device.type != "cpu":
            return [partial(_normal_on, self._on(device))]
        return [partial(_normal, generator) for generator in self._several(min(torch.get_num_threads(), most))]

    def _on(self, device: torch.device) -> torch.Generator:
        self._here()
        if device not in self._devices:
            self._devices[device] = torch.Generator(device).manual_seed(secrets.randbits(63))
        return self._devices[device]

    def _several(self, count: int) -> list[np.random.Generator]:
        """Return independent generators, one for each thread."""
        first = self._here()
        while len(self._others) < count - 1:
            self._others.append(_generator())
        return [first, *self._others[: count - 1]]

    def _here(self) -> np.random.Generator:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        return self._cpu


class SharedRandom:
    """Random numbers that several processes draw alike, from a key that only they know.

    Guarantee: the key is kept in this object alone, which can neither be copied nor pickled.

    Args:
        key: 128 bits.
        step: Another number gives independent random numbers.
    """

    def __init__(self, key: int, step: int = 0) -> None:
        self._generator = _generator([key, step])

    def __reduce__(self) -> NoReturn:
        raise TypeError("random numbers that processes share are secret: they cannot be copied or pickled.")

    def uniform(self, size: int) -> Tensor:
        """Return ``size`` independent values in [0, 1), in float64 on the CPU."""
        return torch.from_numpy(self._generator.random(size))


def _generator(seed: list[int] | None = None) -> np.random.Generator:
    """Return a generator; without a seed, the operating system gives one of 128 bits.

    SFC64: the fastest of NumPy's.
    """
    return np.random.Generator(np.random.SFC64(seed))


def _batches(pieces: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield the pieces in lists of at most so many elements: many small ones in one draw, as each takes its time."""
    batch: list[Tensor] = []
    count = 0
    for piece in pieces:
        if batch and count + piece.numel() > most:
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += piece.numel()
    if batch:
        yield batch


def _add(batches: Iterable[list[Tensor]], std: float, divisor: float, draw: Draw) -> None:
    """Add noise to every piece, and divide."""
    for pieces in batches:
        sizes = [piece.numel() for piece in pieces]
        noisy = draw(sum(sizes), std / divisor).split(sizes)
        torch._foreach_add_(noisy, pieces, alpha=1 / divisor)
        torch._foreach_copy_(pieces, noisy)


def _normal(generator: np.random.Generator, size: int, std: float) -> Tensor:
    """Return normal values, by Box and Muller: two from the logarithm of one uniform value and an angle.

    Torch takes logarithms and cosines of several numbers at once; NumPy's normal values take half as long again.
    """
    half = -(-size // 2)
    values = torch.from_numpy(generator.random(2 * half))
    radii, angles = values[:half].split(_SHORT), values[half:].split(_SHORT)
    torch._foreach_neg_(radii)
    torch._foreach_add_(radii, 1.0)  # in (0, 1], so that the logarithm is finite
    torch._foreach_log_(radii)
    torch._foreach_mul_(radii, -2.0)
    torch._foreach_sqrt_(radii)
    torch._foreach_mul_(radii, std)
    torch._foreach_mul_(angles, 2 * math.pi)
    cosines = torch._foreach_cos(angles)
    torch._foreach_sin_(angles)
    torch._foreach_mul_(angles, radii)
    torch._foreach_mul_(radii, cosines)
    return values[:size]


def _normal_on(generator: torch.Generator, size: int, std: float) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device).mul_(std)
