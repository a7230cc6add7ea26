"""How often a random search trains: a random number whose distribution is fixed beforehand.

Owns: the distribution, and its draw. Does not own: what the search costs (``best_of``), or the search (``tuning``).

Papernot and Steinke 2022 (arXiv 2110.03620), definition 1: the truncated negative binomial distribution with shape
``eta > -1`` and ``gamma`` in (0, 1) has, for ``k >= 1``,
``P[K = k] = (1 - gamma)^k / (gamma^-eta - 1) * prod_{l < k} (l + eta) / (l + 1)``; for ``eta = 0`` it is the
logarithmic one, ``(1 - gamma)^k / (k log(1 / gamma))``, for ``eta = 1`` the geometric one. An infinite shape stands for
Poisson's.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lightning_dp.accounting.phases import check_real

_MOST = 500.0
# What lies beyond is drawn with less probability than one in 10^17.
_LEAST = 1e-18


@dataclass(frozen=True)
class Repetitions:
    """A random number of runs; fixed before the first one.

    Args:
        mean: The expected number, above 1 and at most 500.
        shape: ``eta``, above -1: 0 for the logarithmic distribution, 1 for the geometric one, ``inf`` for Poisson's.
            A smaller one costs less and varies more; Poisson's varies least, and may be 0.

    Raises:
        PrivacyConfigurationError: If a value is out of range.
    """

    mean: float = 10.0
    shape: float = 1.0

    def __post_init__(self) -> None:
        """Check the values, and make them plain floats."""
        expected = "a number above 1 and at most 500, the expected number of runs"
        object.__setattr__(self, "mean", check_real("mean", self.mean, expected, low=1.0, high=_MOST))
        if not (isinstance(self.shape, float) and self.shape == math.inf):
            expected = "a number above -1 (1 is geometric, 0 logarithmic), or inf for Poisson's distribution"
            object.__setattr__(self, "shape", check_real("shape", self.shape, expected, low=-1.0))

    @property
    def is_poisson(self) -> bool:
        """Whether the number is Poisson's."""
        return self.shape == math.inf

    @cached_property
    def log_inverse_gamma(self) -> float:
        """``log(1 / gamma)`` with which the expected number is ``mean``, for all but Poisson's distribution.

        With ``t = log(1 / gamma)`` it is ``eta (e^t - 1) / (1 - e^(-eta t))``, which grows with t.
        """
        low, high = 0.0, 1.0
        while self._mean_at(high) < self.mean:
            low, high = high, 2 * high
        while high - low > 1e-14 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) < self.mean else (low, middle)
        return high

    def probabilities(self) -> Iterator[tuple[int, float]]:
        """Yield every number with its probability, without end."""
        number, probability = (0, math.exp(-self.mean)) if self.is_poisson else (1, self._of_one)
        while True:
            yield number, probability
            number += 1
            if self.is_poisson:
                probability *= self.mean / number
            else:
                probability *= -math.expm1(-self.log_inverse_gamma) * (number - 1 + self.shape) / number

    def draw(self, rng: random.Random) -> int:
        """Return a random number of runs.

        Args:
            rng: ``random.SystemRandom()`` for a search: a number that somebody knows is a number that was chosen.
        """
        left = rng.random()
        for number, probability in self.probabilities():
            left -= probability
            if left < 0 or (number > self.mean and probability < _LEAST):
                return number
        raise AssertionError("the probabilities do not end")

    @property
    def _of_one(self) -> float:
        """``P[K = 1] = eta (1 - gamma) / (gamma^-eta - 1)``."""
        t, eta = self.log_inverse_gamma, self.shape
        return -math.expm1(-t) * _ratio(eta, math.expm1(eta * t), t)

    def _mean_at(self, t: float) -> float:
        return math.expm1(t) * _ratio(self.shape, -math.expm1(-self.shape * t), t)


def _ratio(eta: float, value: float, t: float) -> float:
    """``eta / value``; both vanish with eta, and the value is then as ``eta t``."""
    return eta / value if value else 1 / t
