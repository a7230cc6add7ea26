"""What is accounted for: runs of equal releases, and the checks of every number that enters the accounting.

Owns: :class:`Phase`, the merging of equal phases, argument checks. Does not own: any bound on epsilon (``rdp``,
``gaussian``, ``prv``), nor who made the releases (``ledger``).

A release adds Gaussian noise of standard deviation ``noise_multiplier * sensitivity`` to a sum over a Poisson sample
in which every example is included with probability ``sample_rate`` (Abadi et al. 2016, algorithm 1):
``sum_i clip(g_i) + N(0, (noise_multiplier * sensitivity)^2)``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from lightning_dp.errors import PrivacyConfigurationError

Kind = tuple[float, float]
"""What makes two releases equal to an accountant: ``(noise_multiplier, sample_rate)``."""


@dataclass(frozen=True)
class Phase:
    """A run of equal releases.

    Args:
        noise_multiplier: Noise standard deviation divided by the sensitivity of the sum; 0 means not private.
        sample_rate: Probability with which an example enters one logical batch, in (0, 1].
        num_releases: How many such releases, at least 0.

    Raises:
        PrivacyConfigurationError: If one of the values is not of that kind.
    """

    noise_multiplier: float
    sample_rate: float
    num_releases: int

    def __post_init__(self) -> None:
        """Check the values and make them plain floats and ints, which JSON and caches need."""
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", check_sample_rate(self.sample_rate))
        object.__setattr__(self, "num_releases", check_count("num_releases", self.num_releases))

    @property
    def kind(self) -> Kind:
        """The pair ``(noise_multiplier, sample_rate)``."""
        return self.noise_multiplier, self.sample_rate


def merge_phases(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Add up phases of equal noise and rate and drop empty ones; composition does not depend on the order.

    Args:
        phases: Any phases.

    Returns:
        One phase per kind, in order of first appearance.
    """
    counts: dict[Kind, int] = {}
    for phase in phases:
        counts[phase.kind] = counts.get(phase.kind, 0) + phase.num_releases
    return tuple(Phase(*kind, count) for kind, count in counts.items() if count > 0)


def check_noise_multiplier(value: object) -> float:
    """Return ``value`` as a float; it must be finite and at least 0.

    Raises:
        PrivacyConfigurationError: Otherwise.
    """
    return check_real("noise_multiplier", value, "a finite number >= 0", low=0.0, low_open=False)


def check_sample_rate(value: object) -> float:
    """Return ``value`` as a float; it must lie in (0, 1].

    Raises:
        PrivacyConfigurationError: Otherwise.
    """
    return check_real("sample_rate", value, "a probability in (0, 1]", low=0.0, high=1.0)


def check_delta(name: str, value: object) -> float:
    """Return ``value`` as a float; it must lie in (0, 1).

    Raises:
        PrivacyConfigurationError: Otherwise, naming the argument ``name``.
    """
    return check_real(name, value, "a probability in (0, 1)", low=0.0, high=1.0, high_open=True)


def check_target_epsilon(value: object) -> float:
    """Return ``value`` as a float; it must be finite and above 0.

    Raises:
        PrivacyConfigurationError: Otherwise.
    """
    return check_real("target_epsilon", value, "a finite number > 0 (in nats)", low=0.0)


def check_count(name: str, value: object) -> int:
    """Return ``value`` as an int; it must be an integer (NumPy's too, no bool) of at least 0.

    Raises:
        PrivacyConfigurationError: Otherwise, naming the argument ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise PrivacyConfigurationError(f"{name}={value!r}: expected an integer >= 0.")
    return int(value)


def check_real(
    name: str,
    value: object,
    expected: str,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = True,
    high_open: bool = False,
) -> float:
    """Return ``value`` as a finite float within the bounds, or raise."""
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = number > low if low_open else number >= low
        below = number < high if high_open else number <= high
        if above and below and math.isfinite(number):
            return number
    raise PrivacyConfigurationError(f"{name}={value!r}: expected {expected}.")
