"""From a privacy budget to a noise multiplier or a number of steps, and back.

Owns: :func:`compute_epsilon`, :func:`calibrate_noise_multiplier`, :func:`max_steps` and what
is searched for. Does not own: any bound on epsilon (``prv``, ``rdp``), nor the stop itself (the strategy).

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
from lightning_dp.accounting.search import MOST_NOISE, largest, least_noise, translated

Histories = Sequence[Sequence[Phase]]
"""What different units can have taken part in; the greatest of their epsilons counts."""

# Calibration stops when epsilon is so near the target.
_EPSILON_TOLERANCE = 2e-3


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

    renyi, exact, start, known = epsilon_by(RDPAccountant()), epsilon_by(accountant), 1.0, math.inf
    if renyi(MOST_NOISE) < target_epsilon:  # otherwise only a tighter one may find noise
        known = least_noise(renyi, target_epsilon, start=1.0, tolerance=0.02)
        aim = translated(target_epsilon * (1 - _EPSILON_TOLERANCE / 2), exact(known), renyi(known))
        start = least_noise(renyi, aim, start=known, tolerance=_EPSILON_TOLERANCE / 4)
    return least_noise(exact, target_epsilon, start=start, tolerance=_EPSILON_TOLERANCE, known=known)


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
    renyi, exact = epsilon_by(RDPAccountant()), epsilon_by(accountant)
    known = largest(renyi, target, guess=1)
    aim = translated(target, exact(known), renyi(known)) if known else target
    return largest(exact, target, guess=max(1, largest(renyi, aim, guess=max(1, known))), known=known)
