"""Gaussian noise from a secret generator.

Owns: the generators and the precision of the draw. Does not own: the scale of the noise (``mechanism``).

Guarantee: the seed comes from the operating system, is kept nowhere else and is independent of ``seed_everything``, so
that nobody who knows a run's configuration or checkpoint can subtract its noise. Draws are in float64: a float32 draw
on the CPU is made of 24-bit uniforms and never exceeds 5.77 standard deviations.
"""

from __future__ import annotations

import os
import secrets

import numpy as np
import torch
from torch import Tensor


class SecretRandom:
    """Random numbers for one process, from generators seeded with at least 63 bits by the operating system.

    On the CPU they are NumPy's, whose seed has 128 bits: torch's generator there keeps 32 bits of a seed only, few
    enough to try them all. A copy, a pickle or a forked process begins anew, so that nothing is drawn twice.
    """

    def __init__(self) -> None:
        self._process, self._cpu = os.getpid(), np.random.Generator(np.random.PCG64DXSM())
        self._devices: dict[torch.device, torch.Generator] = {}

    def __reduce__(self) -> tuple[type[SecretRandom], tuple[()]]:
        return type(self), ()

    def uniform(self, size: int) -> Tensor:
        """Return ``size`` independent values in [0, 1), in float64 on the CPU."""
        return torch.from_numpy(self._here().random(size))

    def normal(self, like: Tensor) -> Tensor:
        """Return independent standard normal values in float64, of the shape and on the device of ``like``."""
        device, cpu = like.device, self._here()
        if device.type == "cpu":
            return torch.from_numpy(np.asarray(cpu.standard_normal(tuple(like.shape))))
        if device not in self._devices:
            self._devices[device] = torch.Generator(device).manual_seed(secrets.randbits(63))
        return torch.randn(like.shape, generator=self._devices[device], dtype=torch.float64, device=device)

    def _here(self) -> np.random.Generator:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        return self._cpu
