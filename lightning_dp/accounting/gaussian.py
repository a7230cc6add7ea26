"""The Gaussian mechanism without sampling, exactly.

Owns: epsilon of composed full-batch releases (``sample_rate`` 1). Does not own: sampled releases (``prv``, ``rdp``).

Balle and Wang 2018, theorem 8: with ``mu = sqrt(sum_i n_i / noise_i^2)``,
``delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)``.
"""

import math
from collections.abc import Sequence

from scipy.special import erfcx, ndtr

from lightning_dp.accounting.phases import Phase

# The target is lowered by this share, far above the rounding error of `gaussian_delta`, far below what anyone sees.
_ROUNDING = 1e-9
# A rate this near 1 is treated as 1, which is larger and so safe: the support's lower edge is then lost in rounding.
_FULL = 1 - 1e-6


def is_full(phase: Phase) -> bool:
    """Whether the phase's logical batches are all of the data, or so near it that they count as such."""
    return phase.sample_rate >= _FULL


def full_batch_noise(phases: Sequence[Phase]) -> float:
    """The noise multiplier of the one full-batch release that is as informative as all of these.

    Args:
        phases: Noisy full-batch phases, not empty.

    Returns:
        ``1 / mu``.
    """
    return 1 / math.sqrt(sum(phase.num_releases / phase.noise_multiplier**2 for phase in phases))


def full_batch_epsilon(phases: Sequence[Phase], delta: float) -> float | None:
    """The exact epsilon of composed full-batch releases.

    Args:
        phases: Noisy phases, not empty.
        delta: In (0, 1).

    Returns:
        Epsilon in nats; ``None`` if a phase has sampled batches.
    """
    return gaussian_epsilon(1 / full_batch_noise(phases), delta) if all(map(is_full, phases)) else None


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism at ``epsilon``.

    Args:
        mu: Sensitivity divided by the noise's standard deviation, above 0.
        epsilon: In nats, at least 0.

    Returns:
        Delta, exact up to rounding.
    """
    near, far = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    # e^epsilon * phi(far) = phi(near), so no exponential of epsilon is needed and nothing overflows.
    density = math.exp(-(near**2) / 2) / 2
    if near > 0:
        return float(ndtr(near) - density * erfcx(far / math.sqrt(2)))
    return float(density * (erfcx(-near / math.sqrt(2)) - erfcx(far / math.sqrt(2))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism at ``delta``: the upper end of a bracket as narrow as floats allow.

    Args:
        mu: Sensitivity divided by the noise's standard deviation, above 0.
        delta: Probability in (0, 1).

    Returns:
        Epsilon in nats, at least the true one.
    """
    delta = delta * (1 - _ROUNDING)
    low, high = 0.0, mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if gaussian_delta(mu, low) <= delta:
        return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high
