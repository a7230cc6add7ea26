"""The searches behind a calibration: for the least noise, and for the largest number of releases.

Owns: the order of questions, of which each may take an accountant seconds. Does not own: what is asked
(``calibration``), nor any bound on epsilon.
"""

import math
from collections.abc import Callable

from lightning_dp.errors import PrivacyBudgetExceeded

MAX_RELEASES = 10**9
"""The most releases any search answers; a budget that allows more is endless in practice."""

MOST_NOISE = 2.0**40
"""If even this much leaves epsilon above the target, the releases made before have spent it."""

# Less noise than this is never returned: epsilon is 0 there only because the sample rate itself is below delta.
_LEAST_NOISE = 1e-3
# A bracket of noise multipliers so narrow ends the search.
_NOISE_TOLERANCE = 1e-9
# A guess that is too low is mostly too low by little.
_FIRST_GROWTH = 1.01
# The most by which a count grows at once.
_LONGEST_LEAP = 64.0
# By which part of itself a guess is first moved up or down.
_PARTS = 256


def translated(target: float, exact: float, renyi: float) -> float:
    """The Renyi bound where the exact one is about ``target``: nearby, their quotient hardly changes.

    Args:
        target: What the exact bound is to be, in nats.
        exact: What it is somewhere near.
        renyi: What the Renyi bound is there.
    """
    return target * renyi / exact if 0 < exact < math.inf and 0 < renyi < math.inf else target


def least_noise(
    epsilon: Callable[[float], float], target: float, *, start: float, tolerance: float, known: float = math.inf
) -> float:
    """About the least noise with ``epsilon(noise) <= target``; always one that was seen to satisfy it.

    Args:
        epsilon: Falls as the noise grows.
        target: In nats, above 0.
        start: A guess, above 0.
        tolerance: Epsilon is above ``(1 - tolerance) * target``, or twice as far if it jumps, unless by more than that.
        known: A noise that is perhaps enough: tried if a little more than ``start`` is not.

    Raises:
        PrivacyBudgetExceeded: If no noise is enough.
    """
    enough, less, less_value = start, 0.0, math.inf
    growths = iter([_FIRST_GROWTH])
    while (value := epsilon(enough)) > target:
        if enough > MOST_NOISE:
            raise PrivacyBudgetExceeded(
                f"no noise is enough for target_epsilon={target:g}: earlier releases alone have spent epsilon "
                f"{value:.4g}. Give a larger target_epsilon, or begin a new run on other data."
            )
        less, less_value = enough, value
        enough *= next(growths, 2.0)
        if less < known < math.inf and enough > start * _FIRST_GROWTH:
            enough, known = known, math.inf
    return _narrowed(epsilon, target, less, less_value, enough, value, tolerance)


def _narrowed(
    epsilon: Callable[[float], float],
    target: float,
    less: float,
    less_value: float,
    enough: float,
    value: float,
    tolerance: float,
) -> float:
    """Shrink ``epsilon(enough) <= target < epsilon(less)`` until epsilon is near the target."""
    turn, aim, slack = 0, target * (1 - tolerance / 2), tolerance
    while value < (1 - slack) * target and enough > max(_LEAST_NOISE, less * (1 + _NOISE_TOLERANCE)):
        turn += 1
        # Where epsilon is smooth, three guesses are enough. Where it jumps, interpolation creeps: halve the bracket.
        smooth = turn <= 3 and value > 0 and less_value < math.inf
        ratio, slack = math.log(less_value / value) if smooth else 0.0, tolerance if turn <= 3 else 2 * tolerance
        if less == 0:
            guess = max(_LEAST_NOISE, enough * max(0.5, value / aim))
        else:
            share = math.log(less_value / aim) / ratio if ratio else 0.5
            guess = less * (enough / less) ** share
        if (guess_value := epsilon(guess)) <= target:
            enough, value = guess, guess_value
        else:
            less, less_value = guess, guess_value
    return enough


def largest(epsilon: Callable[[int], float], target: float, *, guess: int, known: int = 0) -> int:
    """A count that fits while the next does not, by moving from a guess and then closing in; 0 if none fits.

    Args:
        epsilon: Grows with the count.
        target: In nats.
        guess: At least 1.
        known: A count that perhaps fits, at most the guess: tried if a little less than ``guess`` does not.
    """
    low = high = guess
    step = max(1, guess // _PARTS)
    if epsilon(guess) <= target:
        while (value := epsilon(high)) <= target:
            if high == MAX_RELEASES:
                return high
            # Epsilon grows about with the root of the count, or faster where it is large.
            ahead = min(_LONGEST_LEAP, (target / value) ** 2) if value > 0 else _LONGEST_LEAP
            low, high, step = high, min(max(high + step, int(high * ahead)), MAX_RELEASES), 2 * step
        return _close_in(epsilon, target, low, high)
    for low in (max(0, guess - step), min(known, max(0, guess - step)), 0):
        if epsilon(low) <= target:
            return _close_in(epsilon, target, low, high)
        high = low
    return 0


def _close_in(epsilon: Callable[[int], float], target: float, low: int, high: int) -> int:
    """Shrink ``epsilon(low) <= target < epsilon(high)`` to neighbours: the Illinois method, or bisection."""
    below, above, side = epsilon(low) - target, epsilon(high) - target, 0
    while high - low > 1:
        share = -below / (above - below) if math.isfinite(above) and side < 3 else 0.5
        middle = min(high - 1, max(low + 1, low + round(share * (high - low))))
        excess = epsilon(middle) - target
        if excess <= 0:
            low, below, above = middle, excess, above / 2 if side > 0 else above
            side = max(side, 0) + 1
        else:
            high, above, below = middle, excess, below / 2 if side < 0 else below
            side = min(side, 0) - 1
    return low
