"""The budget of a run: what was spent, what is left, and the refusal of a release that does not fit.

Owns: the comparison of the ledger with the target, and the order of booking. Does not own: epsilon itself
(``accounting``) or stopping a fit (``callbacks``). Knows nothing of Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_dp.accounting import (
    Accountant,
    EpsilonTable,
    Histories,
    Journal,
    Ledger,
    cross_checked,
    epsilon_curve,
    greatest_epsilon,
    histories,
    max_further_releases,
)
from lightning_dp.errors import PrivacyBudgetExceeded
from lightning_dp.schedule import Schedule

_FIRST_HORIZON = 1000


class PrivacyBudget:
    """Books the releases of a schedule, as long as they fit.

    Guarantee: `book` puts a release on disk, then into the ledger, before it is made; and raises instead if the epsilon
    of the ledger with it would exceed the target. Nothing else decides: no callback, no limit of the trainer.

    Args:
        schedule: Gives noise multiplier and sample rate of every step.
        accountant: Whose epsilon counts.
        ledger: All releases, earlier ones included.
        journal: The ledger's record on disk.
        delta: In (0, 1).
        target_epsilon: In nats; ``None`` for no limit.
        planned_steps: Steps planned in all, from step 0 on, to show ahead; ``None`` if not known.
        step: The step that comes next.
    """

    def __init__(
        self,
        schedule: Schedule,
        accountant: Accountant,
        ledger: Ledger,
        journal: Journal,
        *,
        delta: float,
        target_epsilon: float | None,
        planned_steps: int | None,
        step: int = 0,
    ) -> None:
        self.accountant, self.delta, self.target_epsilon = accountant, delta, target_epsilon
        self.planned_steps = planned_steps
        self._schedule, self._ledger, self._journal = schedule, ledger, journal
        self._begin_at(step)

    def _begin_at(self, step: int) -> None:
        """Count from a step on: all that comes is then looked up."""
        self._first_step, self._num_before = step, self._ledger.num_releases
        self._before = self._ledger.counts
        self._allowed = self._further_releases()
        self._table: EpsilonTable | None = None
        self._horizon = 0

    def keep_in(self, ledger: Ledger, journal: Journal) -> PrivacyBudget:
        """Book in another ledger of the same releases: another process has computed this budget. Return itself."""
        self._ledger, self._journal = ledger, journal
        return self

    @property
    def step(self) -> int:
        """The step that comes next."""
        return self._first_step + self._made

    @property
    def _planned(self) -> int | None:
        return None if self.planned_steps is None else max(0, self.planned_steps - self._first_step)

    @property
    def _made(self) -> int:
        return self._ledger.num_releases - self._num_before

    @property
    def epsilon(self) -> float:
        """What all releases so far have spent: an upper bound, in nats; cross-checked where that is possible."""
        return greatest_epsilon(cross_checked(self.accountant), self._ledger.histories(), self.delta)

    def trusted_accountant(self) -> Accountant:
        """The accountant that may decide: a second one, if of the planned end that says more than the first one does.

        Epsilon grows with every step, so what is reported then exceeds the target at no earlier step either.
        """
        ends = [end for end in (self._planned, self._allowed) if end is not None]
        checked = cross_checked(self.accountant)
        limit = math.inf if self.target_epsilon is None else self.target_epsilon
        for phases in self._histories(min(ends, default=1)):
            trusted = checked.trusted(phases, self.delta, limit)
            if trusted is not self.accountant:
                return trusted
        return self.accountant

    @property
    def epsilon_at_most(self) -> float:
        """A slightly larger bound than `epsilon` that is only looked up: for progress bars."""
        while self._table is None or self._made > self._horizon:
            self._extend_table()
        return self._table.at(self._made)

    @property
    def releases_left(self) -> int | None:
        """How many more releases fit into the target; ``None`` without one."""
        return None if self._allowed is None else max(0, self._allowed - self._made)

    def epsilon_after(self, num_steps: int) -> float:
        """Return what all releases so far and ``num_steps`` more will have spent."""
        return self.forecaster()(num_steps)

    def forecaster(self) -> Callable[[int], float]:
        """Return `epsilon_after` as it is now: what is released later does not change it."""
        made, step, schedule = self._ledger.counts, self.step, self._schedule
        return lambda num_steps: greatest_epsilon(
            self.accountant, histories(made, schedule.releases(step, num_steps)), self.delta
        )

    def check_next(self, step: int | None = None) -> None:
        """Raise if the next release would exceed the target.

        Args:
            step: Which step it is, if not the one after the last.

        Raises:
            PrivacyBudgetExceeded: Before anything is computed for it.
        """
        if step is not None and step != self.step and self._schedule.varies:  # a batch was skipped
            self._begin_at(step)
        if self.releases_left == 0:
            raise PrivacyBudgetExceeded(
                f"the next step would exceed target_epsilon={self.target_epsilon}: {self._ledger.num_releases} "
                f"releases have spent epsilon {self.epsilon:.4f} at delta {self.delta:g}. End the fit here "
                "(PrivacyBudgetStopping does it), or give a larger target_epsilon or more noise for a new run."
            )

    def book(self, step: int | None = None) -> None:
        """Book what is released from one draw. Call it before the first release is made.

        Args:
            step: Which step it is, if not the one after the last.

        Raises:
            PrivacyBudgetExceeded: If it does not fit.
        """
        self.check_next(step)
        release = self._schedule.at(self.step).release
        self._journal.reserve(self._ledger, release, cap=self.releases_left)
        self._ledger.book(release)

    def _histories(self, num_steps: int) -> Histories:
        """Return what units will have taken part in so many steps after the first."""
        return histories(self._before, self._schedule.releases(self._first_step, num_steps))

    def _further_releases(self) -> int | None:
        if self.target_epsilon is None:
            return None
        return max_further_releases(
            self.accountant, self._histories, target_epsilon=self.target_epsilon, delta=self.delta
        )

    def _extend_table(self) -> None:
        planned = self._planned or _FIRST_HORIZON
        expected = planned if self._allowed is None else min(planned, self._allowed)
        self._horizon = max(1, expected, 4 * self._horizon)
        steps, epsilons = epsilon_curve(self.accountant, self._histories, num_steps=self._horizon, delta=self.delta)
        self._table = EpsilonTable(steps, epsilons)
