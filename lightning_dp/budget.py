"""The budget of a run: what was spent, what is left, and the refusal of a release that does not fit.

Owns: the comparison of the ledger with the target, and the order of booking. Does not own: epsilon itself
(``accounting``) or stopping a fit (``callbacks``). Knows nothing of Lightning.
"""

from __future__ import annotations

from lightning_dp.accounting import (
    Accountant,
    EpsilonTable,
    Journal,
    Ledger,
    Phase,
    epsilon_curve,
    max_further_releases,
    merge_phases,
)
from lightning_dp.errors import PrivacyBudgetExceeded
from lightning_dp.mechanism import Mechanism

_FIRST_HORIZON = 1000


class PrivacyBudget:
    """Books releases of one mechanism, as long as they fit.

    Guarantee: `book` puts a release on disk, then into the ledger, before it is made; and raises instead if the epsilon
    of the ledger with it would exceed the target. Nothing else decides: no callback, no limit of the trainer.

    Args:
        mechanism: Gives noise multiplier and sample rate of the releases.
        accountant: Whose epsilon counts.
        ledger: All releases, earlier ones included.
        journal: The ledger's record on disk.
        delta: In (0, 1).
        target_epsilon: In nats; ``None`` for no limit.
        planned_steps: Releases planned in all, to reserve and to show ahead; ``None`` if not known.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        accountant: Accountant,
        ledger: Ledger,
        journal: Journal,
        *,
        delta: float,
        target_epsilon: float | None,
        planned_steps: int | None,
    ) -> None:
        self.delta, self.target_epsilon, self.planned_steps = delta, target_epsilon, planned_steps
        self._mechanism, self._accountant, self._ledger, self._journal = mechanism, accountant, ledger, journal
        self._noise = mechanism.accounted_noise_multiplier
        self._before, self._num_before = ledger.phases, ledger.num_releases
        self._allowed = self._further_releases()
        self._table: EpsilonTable | None = None
        self._horizon = 0

    @property
    def epsilon(self) -> float:
        """What all releases so far have spent: an upper bound, in nats."""
        return self._accountant.epsilon(self._ledger.phases, self.delta)

    @property
    def epsilon_at_most(self) -> float:
        """A slightly larger bound than `epsilon` that is only looked up: for progress bars."""
        if self._noise == 0:
            return self.epsilon
        made = self._ledger.num_releases - self._num_before
        while self._table is None or made > self._horizon:
            self._extend_table()
        return self._table.at(made)

    @property
    def releases_left(self) -> int | None:
        """How many more releases fit into the target; ``None`` without one."""
        if self._allowed is None:
            return None
        return max(0, self._allowed - (self._ledger.num_releases - self._num_before))

    def epsilon_after(self, num_steps: int) -> float:
        """Return what all releases so far and ``num_steps`` more will have spent."""
        more = Phase(self._noise, self._mechanism.sample_rate, num_steps)
        return self._accountant.epsilon(merge_phases([*self._ledger.phases, more]), self.delta)

    def check_next(self) -> None:
        """Raise if the next release would exceed the target.

        Raises:
            PrivacyBudgetExceeded: Before anything is computed for it.
        """
        if self.releases_left == 0:
            raise PrivacyBudgetExceeded(
                f"the next step would exceed target_epsilon={self.target_epsilon}: {self._ledger.num_releases} "
                f"releases have spent epsilon {self.epsilon:.4f} at delta {self.delta:g}. End the fit here "
                "(PrivacyBudgetStopping does it), or give a larger target_epsilon or more noise for a new run."
            )

    def book(self) -> None:
        """Book what is released from one draw. Call it before the first release is made.

        Raises:
            PrivacyBudgetExceeded: If it does not fit.
        """
        self.check_next()
        release = self._mechanism.release
        block = max(1, self._ledger.num_releases // 100)  # what a crash may count too much: 1 %
        self._journal.reserve(self._ledger, release, block=block, cap=self.releases_left)
        self._ledger.book(release)

    def _further_releases(self) -> int | None:
        if self.target_epsilon is None:
            return None
        return max_further_releases(
            self._accountant,
            self._before,
            noise_multiplier=self._noise,
            sample_rate=self._mechanism.sample_rate,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
        )

    def _extend_table(self) -> None:
        planned = self.planned_steps or _FIRST_HORIZON
        expected = planned if self._allowed is None else min(planned, self._allowed)
        self._horizon = max(1, expected, 4 * self._horizon)
        steps, epsilons = epsilon_curve(
            self._accountant,
            self._before,
            noise_multiplier=self._noise,
            sample_rate=self._mechanism.sample_rate,
            num_steps=self._horizon,
            delta=self.delta,
        )
        self._table = EpsilonTable(steps, epsilons)
