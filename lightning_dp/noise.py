"""Gaussian noise from a secret generator.

Owns: the generators and the precision of the draw. Does not own: the scale of the noise (``mechanism``).

Guarantee: the seed comes from the operating system, is kept nowhere else and is independent of ``seed_everything``, so
that nobody who knows a run's configuration or checkpoint can subtract its noise. Draws are in float64: a float32 draw
on the CPU is made of 24-bit uniforms and never exceeds 5.77 standard deviations.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

_PIECE, _CPU_PIECE = 2**24, 2**15
"""Elements that are drawn at once: float64 values of a whole model would take more memory than the model, and on the
CPU a piece stays in the cache until it is added."""


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
            size = _CPU_PIECE if device.type == "cpu" else _PIECE
            pieces = (piece for t in flat for piece in (t.split(size) if t.numel() > size else (t,)))
            batches = list(_batches(pieces, size))
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

    def _draws(self, device: torch.device, most: int) -> list[Callable[[int], Tensor]]:
        """Return what draws so many standard normal values, by independent generators that can run side by side."""
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

    SFC64: a normal value costs a fifth less than with PCG64DXSM, and most of the noise's time goes into those.
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


def _add(batches: Iterable[list[Tensor]], std: float, divisor: float, draw: Callable[[int], Tensor]) -> None:
    """Add noise to every piece, and divide."""
    for pieces in batches:
        sizes = [piece.numel() for piece in pieces]
        noisy = draw(sum(sizes)).mul_(std).add_(pieces[0] if len(pieces) == 1 else torch.cat(pieces)).div_(divisor)
        torch._foreach_copy_(pieces, noisy.split(sizes))


def _normal(generator: np.random.Generator, size: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(size))


def _normal_on(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)
