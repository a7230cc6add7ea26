"""From a privacy budget to a noise multiplier or a number of steps, and back.

Owns: :func:`compute_epsilon`, :func:`calibrate_noise_multiplier`, :func:`max_steps` and the
searches behind them. Does not own: any bound on epsilon (``prv``, ``rdp``), nor the stop itself (the strategy).

All searches run over what the accountant returns, so that every answer holds for the very numbers that
:func:`compute_epsilon` returns; DP-SGD's history is that of Abadi et al. 2016, algorithm 1:
``num_steps`` releases with noise ``N(0, (noise_multiplier * sensitivity)^2)`` at one sample rate.
"""

import math
from collections.abc import Callable, Sequence

from lightning_dp.accounting.accountants import resolve_accountant
from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.phases import (
    Phase,
    check_count,
    check_delta,
    check_noise_multiplier,
    check_sample_rate,
    check_target_epsilon,
)
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.errors import PrivacyBudgetExceeded

Histories = Sequence[Sequence[Phase]]
"""What different units can have taken part in; the greatest of their epsilons counts."""

MAX_RELEASES = 10**9
"""The most releases any search answers; a budget that allows more is endless in practice."""

# Calibration stops when epsilon is so near the target, or when the bracket of noise multipliers is so narrow.
_EPSILON_TOLERANCE, _NOISE_TOLERANCE = 2e-3, 1e-9
# Less noise than this is never returned: epsilon is 0 there only because the sample rate itself is below delta.
_LEAST_NOISE = 1e-3
# If even this much leaves epsilon above the target, the releases made before have spent it.
_MOST_NOISE = 2.0**40


def compute_epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    num_steps: int,
    delta: float,
    accountant: str | Accountant = "prv",
) -> float:
    """An upper bound on the epsilon spent by a run of equal steps.

    Args:
        noise_multiplier: Noise standard deviation divided by the sensitivity of the sum; 0 gives ``inf``.
        sample_rate: Probability with which an example enters one logical batch, in (0, 1].
        num_steps: Number of releases, at least 0; 0 gives 0.
        delta: In (0, 1).
        accountant: ``"prv"`` (tight) or ``"rdp"`` (fast), or an :class:`Accountant`.

    Returns:
        Epsilon in nats.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.

    Guarantee:
        See :class:`Accountant`: add or remove one example, Poisson sampling, plan fixed beforehand.
    """
    phase = Phase(noise_multiplier, sample_rate, check_count("num_steps", num_steps))
    return resolve_accountant(accountant).epsilon([phase], check_delta("delta", delta))


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    num_steps: int,
    accountant: str | Accountant = "prv",
) -> float:
    """A noise multiplier with which a run of equal steps spends the target, and not more.

    Args:
        target_epsilon: In nats, above 0.
        target_delta: In (0, 1).
        sample_rate: Probability with which an example enters one logical batch, in (0, 1].
        num_steps: Number of releases, at least 0; 0 needs no noise and gives 0.
        accountant: ``"prv"`` (tight) or ``"rdp"`` (fast), or an :class:`Accountant`.

    Returns:
        The noise multiplier. Its epsilon is at most the target, and at least 99.5 % of it unless no noise gives that
        (for example where ``num_steps * sample_rate <= target_delta``: then the least noise tried, 0.001).

    Raises:
        PrivacyConfigurationError: If an argument is out of range.

    Guarantee:
        ``compute_epsilon`` of the result, with the same accountant, is at most ``target_epsilon``.
    """
    target, delta = check_target_epsilon(target_epsilon), check_delta("target_delta", target_delta)
    rate, count = check_sample_rate(sample_rate), check_count("num_steps", num_steps)
    chosen = resolve_accountant(accountant)
    if count == 0:
        return 0.0

    return calibrate(chosen, lambda noise: [[Phase(noise, rate, count)]], target_epsilon=target, delta=delta)


def max_steps(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    sample_rate: float,
    accountant: str | Accountant = "prv",
) -> int:
    """The number of equal steps that a budget allows.

    Args:
        target_epsilon: In nats, above 0.
        target_delta: In (0, 1).
        noise_multiplier: Noise standard deviation divided by the sensitivity of the sum; 0 gives 0 steps.
        sample_rate: Probability with which an example enters one logical batch, in (0, 1].
        accountant: ``"prv"`` (tight) or ``"rdp"`` (fast), or an :class:`Accountant`.

    Returns:
        The number of steps; 0 if not even one fits, :data:`MAX_RELEASES` if that many fit.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.

    Guarantee:
        By ``compute_epsilon`` that many steps stay within the target, and one more would not.
    """
    noise, rate = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
    return max_further_releases(
        resolve_accountant(accountant),
        lambda count: [[Phase(noise, rate, count)]],
        target_epsilon=target_epsilon,
        delta=check_delta("target_delta", target_delta),
    )


def greatest_epsilon(accountant: Accountant, histories: Histories, delta: float) -> float:
    """Return the greatest epsilon of several histories, in nats."""
    return max(accountant.epsilon(phases, delta) for phases in histories)


def calibrate(
    accountant: Accountant, histories: Callable[[float], Histories], *, target_epsilon: float, delta: float
) -> float:
    """About the least number whose histories stay within a budget, where epsilon falls as the number grows.

    Args:
        accountant: Whose epsilon counts.
        histories: What units will have taken part in, by the noise multiplier of the releases to come.
        target_epsilon: In nats, above 0.
        delta: In (0, 1).

    Returns:
        The noise multiplier.

    Raises:
        PrivacyBudgetExceeded: If no noise is enough, since earlier releases have spent the budget.
    """

    def epsilon_by(of: Accountant) -> Callable[[float], float]:
        return lambda noise: greatest_epsilon(of, histories(noise), delta)

    start = 1.0
    if epsilon_by(RDPAccountant())(_MOST_NOISE) < target_epsilon:  # otherwise only a tighter one may find noise
        start = _least_noise(epsilon_by(RDPAccountant()), target_epsilon, start=1.0, tolerance=0.02)
    return _least_noise(epsilon_by(accountant), target_epsilon, start=start, tolerance=_EPSILON_TOLERANCE)


def max_further_releases(
    accountant: Accountant, histories: Callable[[int], Histories], *, target_epsilon: float, delta: float
) -> int:
    """How many more releases fit into a budget.

    Args:
        accountant: Whose epsilon counts.
        histories: What units will have taken part in after so many more releases, earlier ones included.
        target_epsilon: In nats, above 0, for history and future together.
        delta: In (0, 1).

    Returns:
        The number of releases; 0 also if the history alone exceeds the target; at most :data:`MAX_RELEASES`.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.

    Guarantee:
        History and that many releases stay within the target by ``accountant``, and one more would not.
    """
    target, delta = check_target_epsilon(target_epsilon), check_delta("delta", delta)

    def epsilon_by(of: Accountant) -> Callable[[int], float]:
        return lambda further: greatest_epsilon(of, histories(further), delta)

    # The Renyi bound costs nothing and is never far off: it saves the grids of all lesser powers of two.
    guess = _largest(epsilon_by(RDPAccountant()), target, guess=1)
    return _largest(epsilon_by(accountant), target, guess=max(1, guess))


def _least_noise(epsilon: Callable[[float], float], target: float, *, start: float, tolerance: float) -> float:
    """About the least noise with ``epsilon(noise) <= target``; always one that was seen to satisfy it."""
    enough, less, less_value, turn = start, 0.0, math.inf, 0
    while (value := epsilon(enough)) > target:
        if enough > _MOST_NOISE:
            raise PrivacyBudgetExceeded(
                f"no noise is enough for target_epsilon={target:g}: earlier releases alone have spent epsilon "
                f"{value:.4g}. Give a larger target_epsilon, or begin a new run on other data."
            )
        enough *= 2
    while value < (1 - tolerance) * target and enough > max(_LEAST_NOISE, less * (1 + _NOISE_TOLERANCE)):
        turn += 1
        # Every third guess halves the bracket, in case epsilon jumps and interpolation creeps.
        ratio = math.log(less_value / value) if value > 0 and less_value < math.inf and turn % 3 else 0.0
        aim = target * (1 - tolerance / 2)
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


def _largest(epsilon: Callable[[int], float], target: float, *, guess: int) -> int:
    """A count that fits while the next does not, by growing from a guess and then closing in; 0 if none fits."""
    low, high, step = 0, guess, max(1, guess // 8)
    while (value := epsilon(high)) <= target:
        if high == MAX_RELEASES:
            return high
        low, high, step = high, min(high + step, MAX_RELEASES), 2 * step
    if low == 0 and epsilon(0) > target:
        return 0
    return _close_in(epsilon, target, low, high, value)


def _close_in(epsilon: Callable[[int], float], target: float, low: int, high: int, value: float) -> int:
    """Shrink ``epsilon(low) <= target < epsilon(high)`` to neighbours: the Illinois method, or bisection."""
    below, above, side = epsilon(low) - target, value - target, 0
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
