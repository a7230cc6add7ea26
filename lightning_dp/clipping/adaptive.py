"""Adaptive clipping: a bound that follows a quantile of the norms.

Owns: the arguments, and how a noise multiplier is divided between gradient and count. Does not own: the bound as it is
now, and its steps (``lightning_dp.quantile_bound``).

Andrew et al., "Differentially private learning with adaptive clipping", arXiv 1905.03871, algorithm 1 and theorem 1.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_dp.clipping.base import NormClipping, positive
from lightning_dp.errors import PrivacyConfigurationError

COUNT_SENSITIVITY = 0.5
"""How far the count can move when one sample is added or removed: each sample adds 1/2 or -1/2."""

_COUNT_SHARE, _LEAST = 20, 5
"""Without a given one, the count's noise is the expected batch over the first, or noise multiplier times the second."""


class AdaptiveClipping(NormClipping):
    """Flat clipping at a bound that moves, step by step, to a quantile of the samples' gradient norms.

    Each step also releases how many samples had a norm of at most C, with noise; then ``C <- C exp(-learning_rate (b -
    quantile))`` for their noisy share b. The gradient has a little more noise than ``noise_multiplier`` says, so that
    both together spend exactly what one gradient with ``noise_multiplier`` does: budget and calibration know nothing of
    the count. The bound is released, and so may be looked at: ``strategy.max_grad_norm``, ``privacy/max_grad_norm``.

    Args:
        max_grad_norm: C > 0, the bound of the first step.
        quantile: In [0, 1]: which share of the samples is to have shorter gradients; 0.5 is their median.
        learning_rate: Above 0: how fast the bound moves.
        count_noise_std: Standard deviation of the noise on the count, in samples; more than half the noise multiplier.
            Default: a twentieth of the expected batch, but at least five times the noise multiplier, with which the
            gradient has at most half a per cent more noise.

    Raises:
        PrivacyConfigurationError: If a value is not of that kind.
    """

    def __init__(
        self,
        max_grad_norm: float = 1.0,
        quantile: float = 0.5,
        learning_rate: float = 0.2,
        count_noise_std: float | None = None,
    ) -> None:
        super().__init__(max_grad_norm)
        number = isinstance(quantile, int | float) and not isinstance(quantile, bool)
        if not number or not 0 <= quantile <= 1:
            raise PrivacyConfigurationError(f"quantile={quantile!r}: expected a number from 0 to 1.")
        self.quantile, self.learning_rate = quantile, positive("learning_rate", learning_rate, "that of the bound")
        self.count_noise_std = count_noise_std
        if count_noise_std is not None:
            self.count_noise_std = positive("count_noise_std", count_noise_std, "in samples")

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.max_grad_norm / norm).clamp(max=1)

    def at(self, max_grad_norm: float) -> AdaptiveClipping:
        """Return the clipping with another bound."""
        return AdaptiveClipping(max_grad_norm, self.quantile, self.learning_rate, self.count_noise_std)

    def count_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Return the standard deviation of the noise on the count; 0 without privacy.

        Args:
            noise_multiplier: z, of gradient and count together.
            expected_batch_size: Of the step.
        """
        if noise_multiplier == 0:
            return 0.0
        if self.count_noise_std is not None:
            return self.count_noise_std
        return max(expected_batch_size / _COUNT_SHARE, _LEAST * noise_multiplier)

    def gradient_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Return the noise multiplier of the gradient alone, ``(z^-2 - (2 z_b)^-2)^(-1/2)``.

        Gaussian releases of noise multipliers z_1 and z_2 from the same draw are one vector with noise multiplier
        ``(z_1^-2 + z_2^-2)^(-1/2)``; that of the count is ``z_b / (1/2)``.

        Args:
            noise_multiplier: z, of gradient and count together.
            expected_batch_size: Of the step.

        Raises:
            PrivacyConfigurationError: If the count alone would spend all of it, or more.
        """
        if noise_multiplier == 0:
            return 0.0
        share = noise_multiplier * COUNT_SENSITIVITY / self.count_noise(noise_multiplier, expected_batch_size)
        if share >= 1:
            raise PrivacyConfigurationError(
                f"count_noise_std={self.count_noise_std} of AdaptiveClipping with noise multiplier "
                f"{noise_multiplier:.4g}: the count alone would spend more than the step may. Use more than "
                f"{noise_multiplier * COUNT_SENSITIVITY:.4g}, or leave it out."
            )
        return noise_multiplier / math.sqrt(1 - share**2)

    def __str__(self) -> str:
        noise = "" if self.count_noise_std is None else f", count noise {self.count_noise_std:g}"
        return f"adaptive (quantile {self.quantile:g}, learning rate {self.learning_rate:g}{noise})"
