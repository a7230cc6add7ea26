"""The accountant: an upper bound on epsilon for a history of releases.

Owns: the abstract :class:`Accountant` and the cases every accountant answers alike. Does not own: any particular bound
(``rdp``, ``prv``, ``pld``, ``filter``), nor the search for a noise multiplier or a number of steps (``calibration``).

A history is ``(epsilon, delta)``-differentially private if ``sup_S P[M(D) in S] - e^epsilon P[M(D') in S] <= delta``
for all neighbouring ``D, D'`` (Dwork et al. 2006), here: one is the other plus one example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from scipy.special import erf

from lightning_dp.accounting.phases import Phase, check_delta, check_target_epsilon, merge_phases

# Of the logarithms of noise and rate, where there are too many kinds: from 0.1 % to everything at once.
_STEPS = tuple(2.0**power for power in range(-10, 7))


# Squares of less and of more noise leave the range of floats: less counts as none, more as this much.
_NO_NOISE, _MOST_NOISE = 1e-100, 1e100


class Accountant(ABC):
    """An upper bound on epsilon for composed releases of the Poisson-sampled Gaussian mechanism.

    Guarantee:
        ``epsilon(phases, delta)`` is at least the true epsilon of the composition of all phases at ``delta``, under
        adding or removing one example, provided that (1) every logical batch is a fresh Poisson sample, (2) noise and
        clipping are as the phases say, (3) noise, rate and number of releases do not depend on what was released,
        unless the accountant is ``adaptive``.

        ============================== ==========================================================================
        case                           epsilon
        ============================== ==========================================================================
        no release                     0
        any release with noise 0       ``inf``
        total variation below delta    0, unless ``adaptive``
        a bound that is not a number   ``inf``
        more kinds than ``most_kinds`` of fewer, with less noise and larger rates: see :func:`coarsened`
        ============================== ==========================================================================
    """

    name: str
    """What the user writes to choose it."""

    adaptive: bool = False
    """Whether noise and rate of a release may depend on all results before it, up to a target fixed beforehand."""

    runs: float = 1.0
    """How many runs like the given one are expected, of which the best alone is released."""

    premise: str = ""
    """What else its epsilon takes for granted, in words that follow a sentence."""

    most_kinds: int = 256
    """How many distinct pairs of noise and rate are accounted for one by one."""

    def for_target(self, target_epsilon: float, delta: float) -> "Accountant":
        """The accountant to use with a target; this one, unless it has something to fix beforehand.

        Args:
            target_epsilon: In nats, above 0.
            delta: In (0, 1).

        Returns:
            An accountant that depends on the two numbers alone, so that a resumed run finds the same.

        Raises:
            PrivacyConfigurationError: If an argument is out of range.
        """
        check_target_epsilon(target_epsilon)
        check_delta("delta", delta)
        return self

    def epsilon(self, phases: Sequence[Phase], delta: float) -> float:
        """An upper bound on epsilon of everything in ``phases``.

        Args:
            phases: Runs of equal releases, in any order.
            delta: Probability in (0, 1) with which epsilon may be exceeded.

        Returns:
            Epsilon in nats, at least 0.

        Raises:
            PrivacyConfigurationError: If ``delta`` does not lie in (0, 1).
        """
        delta = check_delta("delta", delta)
        merged = tuple(sorted(merge_phases(phases), key=lambda phase: phase.kind))
        if any(phase.noise_multiplier < _NO_NOISE for phase in merged):
            return math.inf
        # Not for an adaptive one: a filter watches one quantity, whichever way the run goes.
        if not merged or (not self.adaptive and self.runs * _total_variation(merged) <= delta):
            return 0.0
        merged = merge_phases(
            Phase(min(p.noise_multiplier, _MOST_NOISE), p.sample_rate, p.num_releases) for p in merged
        )
        bound = self._epsilon(coarsened(merged, self.most_kinds), delta)
        return math.inf if math.isnan(bound) else max(0.0, bound)

    @abstractmethod
    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        """The bound itself; the phases are distinct, sorted, not empty and all noisy."""


def coarsened(phases: Sequence[Phase], most: int) -> tuple[Phase, ...]:
    """Noisy releases that are at least as informative, of so many kinds at most.

    Less noise is more informative, since noise can be added; so is a larger rate, since ``M`` of the smaller one is a
    mixture of ``N`` and ``M`` of the larger. Both are rounded on a grid of logarithms, the finest that leaves so few
    kinds. Each grid is twice as coarse as the next and has the same points, so a run that goes on finds them again.

    Args:
        phases: Distinct, sorted, noisy.
        most: At least 1.

    Returns:
        The phases themselves if they are no more, else new ones; sorted.
    """
    if len(phases) <= most:
        return tuple(phases)
    noise, rate = min(phase.noise_multiplier for phase in phases), max(phase.sample_rate for phase in phases)
    for step in _STEPS:
        fewer = merge_phases(_rounded(phase, step, noise, rate) for phase in phases)
        if len(fewer) <= most:
            return tuple(sorted(fewer, key=lambda phase: phase.kind))
    return (Phase(noise, rate, sum(phase.num_releases for phase in phases)),)


def _rounded(phase: Phase, step: float, least_noise: float, most_rate: float) -> Phase:
    """A phase with noise and rate at multiples of the step, as logarithms, but never beyond the given ones."""
    noise = math.exp(step * math.floor(math.log(phase.noise_multiplier) / step))
    rate = math.exp(step * math.ceil(math.log(phase.sample_rate) / step))
    # The rounding of floats must not make either better than it is.
    noise, rate = min(phase.noise_multiplier, noise), max(phase.sample_rate, rate)
    return Phase(max(least_noise, noise), min(most_rate, rate), phase.num_releases)


def _total_variation(phases: Sequence[Phase]) -> float:
    """A bound on the total variation distance, which is delta at epsilon 0, by the triangle inequality.

    The best of K runs differs with at most ``E[K]`` times the probability with which one of them does.
    """
    return sum(
        phase.num_releases * phase.sample_rate * float(erf(1 / (phase.noise_multiplier * math.sqrt(8))))
        for phase in phases
    )
