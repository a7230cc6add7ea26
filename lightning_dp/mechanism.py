"""The mechanism of a step: everything that sampler, clipping, noise and accountant must agree on.

Owns: the numbers. Does not own: any of the parts that use them, nor how they change over a run (``schedule``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from lightning_dp.accounting import Release
from lightning_dp.clipping import AdaptiveClipping, Clipping
from lightning_dp.errors import PrivacyConfigurationError


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-sampled Gaussian mechanism; neighbouring data differ by one unit, added or removed.

    Guarantee: it is frozen and there is one of it for a step, so the sampler draws at the rate that the accountant
    counts, and the noise has the scale of the clipping's sensitivity.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the sensitivity. With
            `AdaptiveClipping`, that of one release which tells as much as gradient and count together.
        clipping: Bounds each unit's gradient.
        sample_rate: q, the probability of each unit to be in a logical batch, in (0, 1].
        expected_batch_size: q N; the sum is divided by it, never by the number drawn, which is private.
        releases_per_draw: Noisy gradients released from one logical batch: more than one only under manual
            optimization, where several optimizers step.
        num_units: N.
        unit: What is added or removed: ``"example"`` or ``"user"``.
        partition: Name of the data; other names share no unit with it. ``None``: nothing is said of that.
    """

    noise_multiplier: float
    clipping: Clipping
    sample_rate: float
    expected_batch_size: float
    releases_per_draw: int = 1
    num_units: int | None = None
    unit: str = "example"
    partition: str | None = None

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum."""
        return self.gradient_noise_multiplier * self.clipping.sensitivity

    @property
    def gradient_noise_multiplier(self) -> float:
        """The noise multiplier of the sum alone: more than ``noise_multiplier`` if a count is released beside it.

        Raises:
            PrivacyConfigurationError: If the count leaves nothing for it.
        """
        clipping = self.clipping
        if not isinstance(clipping, AdaptiveClipping):
            return self.noise_multiplier
        return clipping.gradient_noise_multiplier(self.noise_multiplier, self.expected_batch_size)

    def check(self) -> None:
        """Check that clipping and noise go together.

        Raises:
            PrivacyConfigurationError: If they do not.
        """
        if isinstance(self.clipping, AdaptiveClipping) and self.releases_per_draw > 1:
            raise PrivacyConfigurationError(
                f"AdaptiveClipping with {self.releases_per_draw} releases from one draw, as optimizers step so often "
                "in a training step: gradients of several optimizers have no one quantile that a bound could follow. "
                "Use 'flat' or 'per_layer' clipping, or let one private optimizer step once."
            )
        _ = self.gradient_noise_multiplier  # raises if there is none

    @property
    def accounted_noise_multiplier(self) -> float:
        """The noise multiplier of the one release that is as informative as all releases from one draw together.

        Releases from one draw are not amplified by sampling one by one: an example is in all of them or in none. k
        Gaussian releases, each of sensitivity S and noise std z S, adaptively chosen, tell as much as one with noise
        multiplier z / sqrt(k) (arXiv 1905.02383, section 3), and that pair is amplified by sampling (2106.08567).
        """
        return self.noise_multiplier / math.sqrt(self.releases_per_draw)

    @cached_property
    def release(self) -> Release:
        """What the ledger keeps of all releases from one draw; the same object in every step."""
        noise = self.accounted_noise_multiplier
        return Release(noise, self.sample_rate, self.num_units, self.unit, self.partition)

    def scaled(self, noise_factor: float, batch_size_factor: float) -> Mechanism:
        """Return the mechanism with multiples of this one's noise and batch size."""
        rate = self.sample_rate * batch_size_factor
        return replace(
            self,
            noise_multiplier=self.noise_multiplier * noise_factor,
            sample_rate=1.0 if math.isclose(rate, 1.0, rel_tol=1e-9) else rate,  # 49 * (1 / 49) is not quite 1
            expected_batch_size=self.expected_batch_size * batch_size_factor,
        )
