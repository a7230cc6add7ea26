"""The shares of a search: how a total epsilon is divided among all of its runs.

Owns: the plan, and what is left for the final run. Does not own: the bound on epsilon (``accounting.gaussian``), or
which runs are made (``search``).

All runs are on full batches (``sample_rate`` 1), so that they compose exactly (Dong et al. 2019, arXiv 1905.02383,
corollary 3.3): run i with ``T_i`` steps of ``noise_multiplier`` z_i has ``mu_i = sqrt(T_i) / z_i``, and all of them
have ``mu = sqrt(sum_i mu_i^2)``. So a run's share does not depend on how many steps it makes. That holds also if
results chose the steps, the noise and the number of runs, as long as the total was fixed beforehand (2210.17520).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lightning_dp.accounting import Phase
from lightning_dp.accounting.gaussian import full_batch_noise, gaussian_epsilon, is_full
from lightning_dp.accounting.phases import check_count, check_delta, check_target_epsilon
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyConfigurationError

# What is left out of mu, so that rounding in sums of squares never costs the last step of the final run.
_ROUNDING = 1e-9


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu, but for rounding, whose Gaussian mechanism has at most this epsilon.

    Args:
        epsilon: In nats, above 0.
        delta: In (0, 1).

    Returns:
        Sensitivity divided by the noise's standard deviation, not squared.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.

    Guarantee:
        ``gaussian_epsilon`` of the result is at most ``epsilon``; the inverse of Balle and Wang 2018, theorem 8.
    """
    return _gaussian_mu(check_target_epsilon(epsilon), check_delta("target_delta", delta))


@lru_cache(maxsize=64)
def _gaussian_mu(epsilon: float, delta: float) -> float:
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, delta) <= epsilon else (low, middle)
    return low


def spent_mu(phases: Iterable[Phase]) -> float:
    """Mu of what was released.

    Args:
        phases: All of it.

    Returns:
        0 if nothing was, infinity if something was without noise; not squared.

    Raises:
        PrivacyConfigurationError: If there is something from sampled batches.
    """
    made = [phase for phase in phases if phase.num_releases]
    for phase in made:
        if not is_full(phase):
            raise PrivacyConfigurationError(
                f"sample_rate={phase.sample_rate:.6g} in a search: expected 1, since only full batches compose "
                "exactly, whatever their number. Give the DataLoader batch_size=len(dataset); the memory of a step is "
                "bounded by max_physical_batch_size."
            )
    if any(phase.noise_multiplier == 0 for phase in made):
        return math.inf
    return 1 / full_batch_noise(made) if made else 0.0


@dataclass(frozen=True)
class SearchPlan:
    """How a search divides its budget, fixed before the first run.

    Guarantee: all runs together, with the noise of `noise_multiplier`, spend at most ``target_epsilon`` at
    ``target_delta``.

    Args:
        target_epsilon: For all runs together, in nats.
        target_delta: In (0, 1).
        epsilons: Of one run of each stage, each alone at ``target_delta``, in nats; the last is the final run's.
        num_runs: How many runs there are of each stage; one in the last.
        score_mu: What the score of a run takes beside, not squared; 0 if the validation data is public.

    Raises:
        PrivacyConfigurationError: If a value is out of range, the stages do not match, or all runs together exceed the
            target.
    """

    target_epsilon: float
    target_delta: float
    epsilons: tuple[float, ...]
    num_runs: tuple[int, ...] = (3, 3, 1)
    score_mu: float = 0.0

    def __post_init__(self) -> None:
        """Check the values, and that everything fits."""
        object.__setattr__(self, "target_epsilon", check_target_epsilon(self.target_epsilon))
        object.__setattr__(self, "target_delta", check_delta("target_delta", self.target_delta))
        object.__setattr__(self, "epsilons", tuple(self.epsilons))
        object.__setattr__(self, "num_runs", tuple(self.num_runs))
        _check_stages(self.epsilons, self.num_runs)
        if self.epsilon > self.target_epsilon:
            raise PrivacyConfigurationError(
                f"epsilons={self.epsilons} with num_runs={self.num_runs} compose to epsilon {self.epsilon:.6g} at "
                f"delta {self.target_delta:g}: expected at most target_epsilon={self.target_epsilon:g}. "
                "SearchPlan.within finds the epsilon that is left for the final run."
            )

    @classmethod
    def within(
        cls,
        target_epsilon: float,
        target_delta: float,
        *,
        small_epsilons: tuple[float, ...] | None = None,
        num_runs: tuple[int, ...] = (3, 3),
        score_mu: float = 0.0,
    ) -> SearchPlan:
        """The plan whose final run has all that the small ones leave.

        Args:
            target_epsilon: For all runs together, in nats.
            target_delta: In (0, 1).
            small_epsilons: Of one run of each stage before the final one, rising. Default: 5 % and 20 % of the target.
            num_runs: How many runs there are of each of these stages.
            score_mu: What the score of a run takes beside, not squared.

        Raises:
            PrivacyConfigurationError: If a value is out of range, or the small runs leave less to the final one than
                the largest of them has.
        """
        target, delta = check_target_epsilon(target_epsilon), check_delta("target_delta", target_delta)
        small = (0.05 * target, 0.2 * target) if small_epsilons is None else tuple(small_epsilons)
        _check_stages((*small, target), (*num_runs, 1))
        shares = zip(small, num_runs, strict=True)
        squares = [n * (gaussian_mu(epsilon, delta) ** 2 + score_mu**2) for epsilon, n in shares]
        left = _usable_mu(target, delta) ** 2 - sum(squares) - score_mu**2
        final = gaussian_epsilon(math.sqrt(left), delta) if left > 0 else 0.0
        if final <= small[-1]:
            raise PrivacyConfigurationError(
                f"small_epsilons={small} with num_runs={tuple(num_runs)}"
                f"{f' and scores of mu={score_mu:.3g}' if score_mu else ''} leave epsilon {final:.4g} of "
                f"target_epsilon={target:g} to the final run: expected more than {small[-1]:g}, what a run has that is "
                f"only tried. Use smaller ones, {'more noise for the scores, ' if score_mu else ''}or fewer runs."
            )
        return cls(target, delta, (*small, final), (*num_runs, 1), score_mu)

    @property
    def mu(self) -> float:
        """Of all runs together, not squared."""
        stages = zip(self.epsilons, self.num_runs, strict=True)
        return math.sqrt(
            sum(n * (gaussian_mu(epsilon, self.target_delta) ** 2 + self.score_mu**2) for epsilon, n in stages)
        )

    @property
    def epsilon(self) -> float:
        """What all runs together spend at ``target_delta``, in nats."""
        return gaussian_epsilon(self.mu, self.target_delta)

    def noise_multiplier(self, stage: int, num_steps: int) -> float:
        """The noise with which a run spends the share of its stage, and not more: ``sqrt(T) / mu``.

        Args:
            stage: Counted from 0.
            num_steps: T, at least 1.
        """
        return gaussian_noise(gaussian_mu(self.epsilons[stage], self.target_delta), num_steps)

    def final_mu(self, spent: Iterable[Phase]) -> float:
        """What the final run has: its share, or what is really left after runs that were made twice.

        Args:
            spent: All that was released before it.

        Returns:
            Mu, not squared; `gaussian_noise` gives the noise.

        Raises:
            PrivacyConfigurationError: If something was released from sampled batches.
            PrivacyBudgetExceeded: If less is left than one run of the stage before had.
        """
        before = spent_mu(spent)
        usable = _usable_mu(self.target_epsilon, self.target_delta)
        left = math.sqrt(max(0.0, usable**2 - before**2 - self.score_mu**2))
        if left < gaussian_mu(self.epsilons[-2], self.target_delta):
            epsilon = gaussian_epsilon(before, self.target_delta) if math.isfinite(before) else math.inf
            raise PrivacyBudgetExceeded(
                f"{epsilon:.4g} of target_epsilon={self.target_epsilon:g} are spent before the final run, which would "
                f"have less than epsilon={self.epsilons[-2]:g}, what a run has that is only tried. Runs that were "
                "interrupted and made again are paid for twice. Begin a new search, with a budget of its own."
            )
        return min(gaussian_mu(self.epsilons[-1], self.target_delta), left)


def gaussian_noise(mu: float, num_steps: int) -> float:
    """The noise multiplier with which so many full-batch steps have this mu: ``sqrt(T) / mu``.

    Args:
        mu: Above 0, not squared.
        num_steps: T, at least 1.

    Raises:
        PrivacyConfigurationError: If there are no steps.
    """
    if check_count("num_steps", num_steps) < 1:
        raise PrivacyConfigurationError(f"num_steps={num_steps}: expected at least 1.")
    return math.sqrt(num_steps) / mu


def _usable_mu(epsilon: float, delta: float) -> float:
    return gaussian_mu(epsilon, delta) * (1 - _ROUNDING)


def _check_stages(epsilons: tuple[float, ...], num_runs: tuple[int, ...]) -> None:
    for epsilon in epsilons:
        check_target_epsilon(epsilon)
    if len(epsilons) != len(num_runs) or len(epsilons) < 3:
        raise PrivacyConfigurationError(
            f"num_runs={num_runs} for epsilons={epsilons}: expected one number for each stage, of at least two small "
            "stages and the final run."
        )
    if any(check_count("num_runs", n) < 1 for n in num_runs) or num_runs[-1] != 1:
        raise PrivacyConfigurationError(f"num_runs={num_runs}: expected at least 1 of each stage, and 1 final run.")
    if any(a >= b for a, b in zip(epsilons, epsilons[1:], strict=False)):
        raise PrivacyConfigurationError(
            f"epsilons={epsilons}: expected each to be larger than the one before, the final run's last: what is best "
            "is extrapolated upwards."
        )
