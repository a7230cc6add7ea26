"""The mechanism of one run: everything that sampler, clipping, noise and accountant must agree on.

Owns: the numbers. Does not own: any of the parts that use them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dp.accounting import Release
from lightning_dp.clipping import Clipping


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-sampled Gaussian mechanism of a run; add-or-remove-one neighbouring relation.

    Guarantee: it is frozen and there is one of it, so the sampler draws at the rate that the accountant counts, and the
    noise has the scale of the clipping's sensitivity.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the sensitivity.
        clipping: Bounds each sample's gradient.
        sample_rate: q, the probability of each example to be in a logical batch, in (0, 1].
        expected_batch_size: q N; the sum is divided by it, never by the number drawn, which is private.
        releases_per_draw: Noisy gradients released from one logical batch: more than one only under manual
            optimization, where several optimizers step.
    """

    noise_multiplier: float
    clipping: Clipping
    sample_rate: float
    expected_batch_size: float
    releases_per_draw: int = 1

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum."""
        return self.noise_multiplier * self.clipping.sensitivity

    @property
    def accounted_noise_multiplier(self) -> float:
        """The noise multiplier of the one release that is as informative as all releases from one draw together.

        Releases from one draw are not amplified by sampling one by one: an example is in all of them or in none. k
        Gaussian releases, each of sensitivity S and noise std z S, adaptively chosen, tell as much as one with noise
        multiplier z / sqrt(k) (arXiv 1905.02383, section 3), and that pair is amplified by sampling (2106.08567).
        """
        return self.noise_multiplier / math.sqrt(self.releases_per_draw)

    @property
    def release(self) -> Release:
        """What the ledger keeps of all releases from one draw."""
        return Release(self.accounted_noise_multiplier, self.sample_rate)
