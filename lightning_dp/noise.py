"""Gaussian noise from a secret generator.

Owns: the generators and the precision of the draw. Does not own: the scale of the noise (``mechanism``).

Guarantee: the seed comes from the operating system, is kept nowhere else and is independent of ``seed_everything``, so
that nobody who knows a run's configuration or checkpoint can subtract its noise. Draws are in float64: a float32 draw
on the CPU is made of 24-bit uniforms and never exceeds 5.77 standard deviations.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
        self._process, self._cpu = os.getpid(), np.random.Generator(np.random.PCG64DXSM())
        self._others: list[np.random.Generator] = []
        self._devices: dict[torch.device, torch.Generator] = {}

    def __reduce__(self) -> tuple[type[SecretRandom], tuple[()]]:
        return type(self), ()

    def uniform(self, size: int) -> Tensor:
        """Return ``size`` independent values in [0, 1), in float64 on the CPU."""
        return torch.from_numpy(self._here().random(size))

    def add_normal(self, total: Tensor, std: float, divisor: float = 1.0) -> None:
        """Replace ``total`` by ``(total + noise) / divisor``, computed in float64.

        Args:
            total: Contiguous, of any shape and real dtype.
            std: Standard deviation of the independent noise of every element.
            divisor: Divides the sum.
        """
        if total.device.type != "cpu":
            _add(total.view(-1).split(_PIECE), std, divisor, partial(_normal_on, self._on(total.device)))
            return
        pieces = total.view(-1).split(_CPU_PIECE)
        generators = self._several(min(torch.get_num_threads(), len(pieces)))
        shares = [pieces[i :: len(generators)] for i in range(len(generators))]
        work = [
            partial(_add, share, std, divisor, partial(_normal, g)) for share, g in zip(shares, generators, strict=True)
        ]
        if len(work) == 1:
            work[0]()
        else:
            with ThreadPoolExecutor(len(work)) as threads:
                list(threads.map(lambda one: one(), work))

    def _on(self, device: torch.device) -> torch.Generator:
        self._here()
        if device not in self._devices:
            self._devices[device] = torch.Generator(device).manual_seed(secrets.randbits(63))
        return self._devices[device]

    def _several(self, count: int) -> list[np.random.Generator]:
        """Return independent generators, one for each thread."""
        first = self._here()
        while len(self._others) < count - 1:
            self._others.append(np.random.Generator(np.random.PCG64DXSM()))
        return [first, *self._others[: count - 1]]

    def _here(self) -> np.random.Generator:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        return self._cpu


def _add(pieces: Iterable[Tensor], std: float, divisor: float, draw: Callable[[int], Tensor]) -> None:
    """Add noise to every piece, and divide."""
    for piece in pieces:
        piece.copy_(draw(piece.numel()).mul_(std).add_(piece).div_(divisor))


def _normal(generator: np.random.Generator, size: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(size))


def _normal_on(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device)
