"""The privacy loss of one release as a random variable, ready to be discretised.

Owns: its distribution, truncated, in both directions of the neighbouring relation, and its mean. Does not own: the grid
and the composition (``prv``).

With ``N = N(0, s^2)`` and ``M = (1-q) N(0, s^2) + q N(1, s^2)`` (Gopi, Lee, Wutschitz 2021, section 3) the loss is
``log M(x)/N(x) = log(1 + q (e^{(2x-1)/(2s^2)} - 1))`` for ``x ~ M`` (an example is removed) and its negative for
``x ~ N`` (an example is added). It increases in ``x``, so every interval of losses is an interval of ``x``.
"""

import numpy as np
import numpy.typing as npt
from prv_accountant.privacy_random_variables import PrivacyRandomVariable
from scipy.special import ndtr

Array = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Mass beyond so many standard deviations is below 1e-36.
_REACH = 13.0


class TruncatedLoss(PrivacyRandomVariable):  # type: ignore[misc]
    """The privacy loss of one release, conditioned on lying in ``[t_min, t_max]``.

    ``prv_accountant`` has this class too; its adaptive quadrature of the mean can miss the lower edge of the support
    without a word, and its distribution function cancels in the tails. Here both are done on the scale of ``x``, where
    the density is a Gaussian mixture and the loss is smooth.

    Args:
        noise_multiplier: Above 0.
        sample_rate: In (0, 1].
        adding: Whether the example is added (``x ~ N``) rather than removed (``x ~ M``).
        t_min: Least loss, in nats, below 0.
        t_max: Greatest loss, in nats, above 0.
    """

    def __init__(
        self, noise_multiplier: float, sample_rate: float, *, adding: bool, t_min: float, t_max: float
    ) -> None:
        """Normalise the mass within the bounds."""
        self.noise, self.rate, self.adding = noise_multiplier, sample_rate, adding
        self.t_min, self.t_max = t_min, t_max
        self._mass = 1.0
        self._mass = float(self.probability(np.array([t_min]), np.array([t_max]))[0])

    def probability(self, a: Array, b: Array) -> Array:
        """The probability that the loss lies between ``a`` and ``b``, accurate relative to itself in both tails."""
        a, b = (np.clip(np.asarray(t, dtype=np.float64), self.t_min, self.t_max) for t in (a, b))
        if self.adding:
            return self._gaussian(self._x(-b), self._x(-a)) / self._mass
        left, right = self._x(a), self._x(b)
        below, above = self._gaussian(left, right), self._gaussian(left - 1, right - 1)
        return ((1 - self.rate) * below + self.rate * above) / self._mass

    def cdf(self, t: Array) -> Array:
        """The probability that the loss is at most ``t``."""
        return self.probability(np.full_like(np.asarray(t, dtype=np.float64), self.t_min), t)

    def mean(self) -> float:
        """The mean loss, by Gauss-Legendre quadrature on panels too small for the integrand to surprise them.

        The loss is analytic within ``pi s^2`` of the real axis and the density an entire function of scale ``s``.
        """
        low, high = np.sort(self._x(np.array([self.t_min, self.t_max]) * (-1 if self.adding else 1)))
        low, high = max(low, -_REACH * self.noise), min(high, 1 + _REACH * self.noise)
        width = min(self.noise, self.noise**2) / 2
        breaks = np.linspace(low, high, int((high - low) / width) + 2)
        half = np.diff(breaks)[:, None] / 2
        x = breaks[:-1, None] + half * (1 + _NODES)
        integral = float((half * _WEIGHTS * self._density(x) * self._loss(x)).sum())
        return (-integral if self.adding else integral) / self._mass

    def _x(self, t: Array) -> Array:
        """The point at which ``log M(x)/N(x)`` is ``t``; minus infinity below the support."""
        if self.rate == 1:
            return self.noise**2 * t + 0.5
        with np.errstate(divide="ignore"):
            return self.noise**2 * np.log1p(np.maximum(np.expm1(t) / self.rate, -1.0)) + 0.5

    def _loss(self, x: Array) -> Array:
        """``log M(x)/N(x)``; no overflow, no cancellation at small rates."""
        exponent = (2 * x - 1) / (2 * self.noise**2)
        if self.rate == 1:
            return exponent
        large = np.log(self.rate) + np.logaddexp(exponent, np.log1p(-self.rate) - np.log(self.rate))
        return np.where(exponent > 1, large, np.log1p(self.rate * np.expm1(np.minimum(exponent, 1))))

    def _density(self, x: Array) -> Array:
        """The density of ``x``: of ``N`` if the example is added, else of ``M``."""
        rate = 0.0 if self.adding else self.rate
        scale = 2 * self.noise**2
        mixture = (1 - rate) * np.exp(-(x**2) / scale) + rate * np.exp(-((x - 1) ** 2) / scale)
        return np.asarray(mixture / (self.noise * np.sqrt(2 * np.pi)))

    def _gaussian(self, left: Array, right: Array) -> Array:
        """``P[left < N(0, s^2) < right]``, computed in the tail it lies in."""
        left, right = left / self.noise, right / self.noise
        flip = left > 0
        return np.asarray(ndtr(np.where(flip, -left, right)) - ndtr(np.where(flip, -right, left)))
