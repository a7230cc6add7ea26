"""The clippings with one factor for each sample: flat, automatic, and per-sample adaptive.

Owns: their factors. Flat: arXiv 1607.00133, algorithm 1. Automatic ("AUTO-S"): arXiv 2206.07136, equation 5. Per-sample
adaptive ("PSAC"): arXiv 2212.00328, equation 6.
"""

from __future__ import annotations

from torch import Tensor

from lightning_dp.clipping.base import NormClipping, positive


class FlatClipping(NormClipping):
    """``min(1, C / norm)``: shortens what is longer than C, leaves the rest as it is."""

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.max_grad_norm / norm).clamp(max=1)

    def __str__(self) -> str:
        return "flat"


class AutomaticClipping(NormClipping):
    """``C / (norm + 0.01)``: brings every gradient near length C, so that C only scales the learning rate."""

    stability = 0.01
    """Added to the norm: keeps apart gradients that are small, so that training converges."""

    def _factor(self, norm: Tensor) -> Tensor:
        return self.max_grad_norm / (norm + self.stability)

    def __str__(self) -> str:
        return "automatic"


class PSACClipping(NormClipping):
    """``C / (norm + r / (norm + r))``: as `AutomaticClipping` for long gradients, and weighs short ones less.

    With ``AutomaticClipping`` a gradient of norm near 0 has the factor 100 C; here it has C, since ``r / (norm + r)``
    goes to 1. The factor is greatest near ``norm = sqrt(r) - r``.

    Args:
        max_grad_norm: C > 0, which only scales the learning rate.
        r: Above 0: the smaller, the longer the reach of the plain ``C / norm``.

    Raises:
        PrivacyConfigurationError: If a value is not of that kind.
    """

    def __init__(self, max_grad_norm: float = 1.0, r: float = 0.1) -> None:
        super().__init__(max_grad_norm)
        self.r = positive("r", r, "which sets how much short gradients weigh")

    def _factor(self, norm: Tensor) -> Tensor:
        return self.max_grad_norm / (norm + self.r / (norm + self.r))

    def __str__(self) -> str:
        return f"psac (r {self.r:g})"
