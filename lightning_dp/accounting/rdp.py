"""Renyi accounting of the Poisson-sampled Gaussian mechanism: fast, never far off, the fallback of all else.

Owns: Renyi divergences of one release over a fixed grid of orders, their conversion to epsilon, a tail bound on the
privacy loss. Does not own: tight epsilons (``prv``).

Mironov, Talwar, Zhang 2019: for ``a > 1`` both directions of adding and removing are bounded by
``R(a) = log E_{x ~ N(0, s^2)} [(1 - q + q e^{(2x-1)/(2s^2)})^a] / (a - 1)``, and ``R`` adds up over releases.
Canonne, Kamath, Steinke 2020, proposition 12: ``epsilon <= R(a) + log(1 - 1/a) - log(a * delta) / (a - 1)``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.phases import Phase

Array = npt.NDArray[np.float64]

# Small orders rule large epsilons and need fractions; large orders rule small epsilons and can be far apart.
_FRACTIONS: Array = np.concatenate([1 + np.geomspace(1e-4, 0.1, 12), np.arange(1.15, 4, 0.1), np.arange(4.25, 12, 0.5)])
_INTEGERS: Array = np.unique(np.concatenate([np.arange(2, 64), np.round(np.geomspace(64, 32768, 30))]))
ORDERS: Array = np.concatenate([_FRACTIONS, _INTEGERS])
"""The orders at which divergences are computed; fractions first, each part increasing."""
# Below this noise the quadrature for fractions would need too many nodes; cruder bounds serve as well there.
_LEAST_QUADRATURE_NOISE = 0.03


class RDPAccountant(Accountant):
    """Renyi accountant: about a tenth above the truth in common settings, in milliseconds.

    Guarantee:
        See :class:`Accountant`; no further precondition.
    """

    name = "rdp"

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        divergences = composed_divergences(phases)
        return float(np.min(divergences + conversion(delta)))


def conversion(delta: float) -> Array:
    """What to add to a Renyi divergence to get an epsilon, at every order of the grid.

    Args:
        delta: In (0, 1).

    Returns:
        In nats, ``[orders]``; negative where delta is so large that it pays for some of the divergence.
    """
    return np.asarray(np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1))


def composed_divergences(phases: Sequence[Phase]) -> Array:
    """Renyi divergence of the composition, at every order of the grid.

    Args:
        phases: Noisy phases.

    Returns:
        Upper bounds in nats, ``[orders]``.
    """
    total = np.zeros_like(ORDERS)
    for phase in phases:
        total = total + phase.num_releases * divergences(*phase.kind)
    return total


def loss_tail(phases: Sequence[Phase], probability: float) -> float:
    """A value that the absolute privacy loss exceeds with at most ``probability``, in either direction.

    By Markov's inequality ``P[|loss| >= t] <= 2 exp((a - 1) (R(a) - t))`` at every order ``a``.

    Args:
        phases: Noisy phases, composed.
        probability: In (0, 1).

    Returns:
        The value, in nats.
    """
    return float(np.min(composed_divergences(phases) + math.log(2 / probability) / (ORDERS - 1)))


@lru_cache(maxsize=1024)
def divergences(noise_multiplier: float, sample_rate: float) -> Array:
    """Renyi divergence of one release, at every order of the grid; an upper bound in spite of rounding.

    Args:
        noise_multiplier: Above 0.
        sample_rate: In (0, 1].

    Returns:
        In nats, ``[orders]``.
    """
    unsampled = ORDERS / (2 * noise_multiplier**2)
    if sample_rate == 1:
        return unsampled
    whole = np.array([_log_moment(noise_multiplier, sample_rate, int(order)) for order in _INTEGERS])
    if noise_multiplier >= _LEAST_QUADRATURE_NOISE:
        parts = _log_moments_by_quadrature(noise_multiplier, sample_rate, _FRACTIONS)
    else:  # the log-moment is convex in the order and 0 at order 1, so its chords lie above it
        parts = np.interp(_FRACTIONS, [1.0, *_INTEGERS], [0.0, *whole])
    log_moments = np.concatenate([parts, whole * (1 + 1e-12)])
    # Sampling never makes the divergence larger: M is a mixture of N and its shifted copy.
    return np.minimum(log_moments / (ORDERS - 1), unsampled)


@lru_cache(maxsize=256)
def _log_binomials(order: int) -> Array:
    """``log C(order, k)`` for ``k = 2 .. order``."""
    k = np.arange(2.0, order + 1)
    result: Array = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    return result


def _log_moment(noise: float, rate: float, order: int) -> float:
    """``log E_N[(M/N)^order]``, with the binomial sum's 1 taken out: all terms are positive, nothing cancels."""
    k = np.arange(2.0, order + 1)
    exponent = k * (k - 1) / (2 * noise**2)
    log_growth = exponent + np.log(-np.expm1(-exponent))
    terms = _log_binomials(order) + k * math.log(rate) + (order - k) * math.log1p(-rate) + log_growth
    return float(np.logaddexp(0.0, _log_sum_exp(terms)))


def _log_moments_by_quadrature(noise: float, rate: float, orders: Array) -> Array:
    """``log E_N[(M/N)^order]`` for fractions, by the trapezoidal rule, exponentially accurate for this integrand.

    The nearest singularity lies ``pi noise^2`` off the real axis, hence a step of ``noise^2 / 2`` errs by ``e^-39``.
    """
    step = min(noise / 4, noise**2 / 2)
    x = np.arange(-14 * noise, float(orders.max()) + 14 * noise, step)
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + math.log(step)
    result = np.array([_log_sum_exp(order * log_ratio + log_density) for order in orders])
    return np.asarray(np.maximum(result, 0.0) + 1e-13 * (1 + np.abs(result)))


def _log_sum_exp(terms: Array) -> float:
    """``log sum e^terms``; SciPy's serves more kinds of array and takes several times as long for short ones."""
    largest = float(terms.max())
    return largest + math.log(float(np.exp(terms - largest).sum())) if math.isfinite(largest) else largest
