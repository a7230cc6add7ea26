"""The runs of a search: which come next, and what came out of those before.

Owns: the order of the runs, the settings that are tried, and the choice of the best. Does not own: how a run is made
(``fits``), what is kept of it on disk (``history``), or the budget (``shares``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_dp.accounting import Phase
from lightning_dp.accounting.gaussian import gaussian_epsilon
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.tuning.scaling import Line, SearchSpace, Setting
from lightning_dp.tuning.scores import PrivateSelection
from lightning_dp.tuning.shares import SearchPlan, gaussian_mu, gaussian_noise


@dataclass(frozen=True)
class Trial:
    """A run that is to be made.

    Args:
        stage: Counted from 0; the last one is the final run's.
        is_final: Whether it is that.
        setting: Learning rate and steps.
        epsilon: What the run alone spends, in nats.
        noise_multiplier: Of every step.
    """

    stage: int
    is_final: bool
    setting: Setting
    epsilon: float
    noise_multiplier: float


@dataclass(frozen=True)
class Outcome:
    """A run that was made.

    Args:
        stage: Counted from 0.
        epsilon: What the run alone spent, in nats.
        lr: Learning rate.
        num_steps: Steps.
        score: By the validation data, noisy if that is private; not a number if there was none.
    """

    stage: int
    epsilon: float
    lr: float
    num_steps: int
    score: float

    @property
    def r(self) -> float:
        """Learning rate times steps."""
        return self.lr * self.num_steps


@dataclass(frozen=True)
class Search:
    """All that a search follows from; public, and fixed before its first run.

    Args:
        plan: The shares of the budget.
        space: Where settings are tried.
        monitor: Name of the validation metric that chooses.
        mode: Whether ``"max"`` or ``"min"`` of it is best.
        seed: Of the settings that are tried.
        selection: How scores are paid for; ``None`` for public validation data.

    Raises:
        PrivacyConfigurationError: If ``mode`` is neither.
    """

    plan: SearchPlan
    space: SearchSpace
    monitor: str
    mode: str = "max"
    seed: int = 0
    selection: PrivateSelection | None = None

    def __post_init__(self) -> None:
        """Check the mode."""
        check_mode(self.mode)

    @property
    def num_runs(self) -> int:
        """All of them, the final one included."""
        return sum(self.plan.num_runs)

    def next(self, outcomes: Sequence[Outcome], spent: Iterable[Phase]) -> Trial | None:
        """Return the run that comes next; ``None`` after the final one.

        Args:
            outcomes: Of all runs so far, in their order.
            spent: All that was released, by runs that were interrupted, too.

        Raises:
            PrivacyBudgetExceeded: If what is left is less than the final run should have at the least.
            PrivacyError: If no run of a stage has a score.
        """
        done, stages = len(outcomes), [k for k, n in enumerate(self.plan.num_runs) for _ in range(n)]
        if done >= len(stages):
            return None
        stage, is_final = stages[done], done == len(stages) - 1
        if is_final:
            mu = self.plan.final_mu(spent)
            epsilon = gaussian_epsilon(mu, self.plan.target_delta)
            setting = self.space.divided(self.line(outcomes)(epsilon))
        else:
            epsilon, setting = self.plan.epsilons[stage], self._drawn()[done]
            mu = gaussian_mu(epsilon, self.plan.target_delta)
        return Trial(stage, is_final, setting, epsilon, gaussian_noise(mu, setting.num_steps))

    def line(self, outcomes: Sequence[Outcome]) -> Line:
        """Return the line through the best r of each small stage.

        Raises:
            PrivacyError: If no run of a stage has a score.
        """
        last = len(self.plan.num_runs) - 1
        return Line.through([(self.plan.epsilons[k], self.best(outcomes, k).r) for k in range(last)])

    def best(self, outcomes: Sequence[Outcome], stage: int) -> Outcome:
        """Return the best run of a stage.

        Raises:
            PrivacyError: If none has a score.
        """
        scored = [one for one in outcomes if one.stage == stage and not math.isnan(one.score)]
        if not scored:
            raise PrivacyError(
                f"no run at epsilon={self.plan.epsilons[stage]:g} has a number as {self.monitor!r}: there is no best "
                "one to go on from. Begin a new search, with smaller learning rates and a budget of its own."
            )
        return max(scored, key=lambda one: signed(one.score, self.mode))

    def _drawn(self) -> list[Setting]:
        """The settings of all small runs, the same in every process."""
        rng = random.Random(self.seed)
        return [self.space.draw(rng) for _ in range(self.num_runs - 1)]


def check_mode(mode: str) -> None:
    """Raise if this is no way to choose."""
    if mode not in ("max", "min"):
        raise PrivacyConfigurationError(f"mode={mode!r}: expected 'max' or 'min'.")


def signed(score: float, mode: str) -> float:
    """A number that is larger for a better score."""
    return score if mode == "max" else -score
