"""Clipping: the factor that bounds what one sample adds, and the sensitivity that follows.

Owns: factors and sensitivities. Does not own: the norms (``bookkeeping``) or the noise (``noise``).

Flat clipping: arXiv 1607.00133, algorithm 1. Automatic clipping ("AUTO-S"): arXiv 2206.07136, equation 5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyConfigurationError


class Clipping(ABC):
    """Bounds each sample's gradient.

    Guarantee: ``factor(norm) * norm <= sensitivity`` for every norm, up to the rounding of the norm's dtype. A norm
    that is not finite has the factor 0: such a sample adds nothing, which the bound allows.

    Args:
        max_grad_norm: C > 0, the largest norm of what one sample adds to the sum.

    Raises:
        PrivacyConfigurationError: If ``max_grad_norm`` is not a positive finite number.
    """

    def __init__(self, max_grad_norm: float = 1.0) -> None:
        if not (isinstance(max_grad_norm, int | float) and math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise PrivacyConfigurationError(
                f"max_grad_norm={max_grad_norm!r}: expected a positive number, the largest norm of one sample's "
                "gradient."
            )
        self.max_grad_norm = float(max_grad_norm)

    @property
    def sensitivity(self) -> float:
        """How far the sum can move when one example is added or removed (L2 norm, not squared)."""
        return self.max_grad_norm

    def factor(self, norm: Tensor) -> Tensor:
        """Return the factors of gradients with these norms.

        Args:
            norm: L2 norms (not squared) of the samples' gradients, shape ``[B]``.

        Returns:
            Factors, shape ``[B]``, 0 where the norm is not finite.
        """
        return torch.where(norm.isfinite(), self._factor(norm), torch.zeros_like(norm))

    @abstractmethod
    def _factor(self, norm: Tensor) -> Tensor:
        """Return the factors of finite norms."""


class FlatClipping(Clipping):
    """``min(1, C / norm)``: shortens what is longer than C, leaves the rest as it is."""

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.max_grad_norm / norm).clamp(max=1)


class AutomaticClipping(Clipping):
    """``C / (norm + 0.01)``: brings every gradient near length C, so that C only scales the learning rate."""

    stability = 0.01
    """Added to the norm: keeps apart gradients that are small, so that training converges."""

    def _factor(self, norm: Tensor) -> Tensor:
        return self.max_grad_norm / (norm + self.stability)


_BY_NAME: dict[str, type[Clipping]] = {"flat": FlatClipping, "automatic": AutomaticClipping}


def resolve_clipping(clipping: str, max_grad_norm: float) -> Clipping:
    """Return the clipping of a name.

    Raises:
        PrivacyConfigurationError: If there is none of that name.
    """
    if clipping not in _BY_NAME:
        raise PrivacyConfigurationError(f"clipping={clipping!r}: expected one of {sorted(_BY_NAME)}.")
    return _BY_NAME[clipping](max_grad_norm)
