"""Gaussian noise from a secret generator.

Owns: the generators and the precision of the draw. Does not own: the scale of the noise (``mechanism``).

Guarantee: the seed comes from the operating system, is kept nowhere else and is independent of ``seed_everything``, so
that nobody who knows a run's configuration or checkpoint can subtract its noise. Draws are in float64: a float32 draw
on the CPU is made of 24-bit uniforms and never exceeds 5.77 standard deviations.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by the operating system."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


class GaussianNoise:
    """Draws noise on any device, each with a secret generator of its own."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def draw(self, like: Tensor, std: float) -> Tensor:
        """Return independent normal values of mean 0 in float64.

        Args:
            like: Gives shape and device.
            std: Standard deviation of every coordinate (not squared).
        """
        device = like.device
        if device not in self._generators:
            self._generators[device] = secret_generator(device)
        noise = torch.randn(like.shape, generator=self._generators[device], dtype=torch.float64, device=device)
        return noise.mul_(std)
