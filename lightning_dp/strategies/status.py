"""What a user may ask a private strategy.

Owns: the properties. Does not own: what they tell (``run``).
"""

from __future__ import annotations

from lightning_dp.accounting import Release, claim
from lightning_dp.budget import PrivacyBudget
from lightning_dp.record import Record
from lightning_dp.strategies.run import PrivateRun


class PrivacyStatus:
    """Epsilon, delta, noise, rate and releases of a run; the same for every private strategy."""

    _run: PrivateRun

    @property
    def epsilon(self) -> float:
        """Epsilon spent by all releases so far, through resumes: an upper bound, in nats."""
        return self._run.epsilon

    @property
    def delta(self) -> float | None:
        """The delta that epsilon is for; ``None`` before the training data is known, if none was given."""
        return self._run.delta

    @property
    def noise_multiplier(self) -> float | None:
        """The noise multiplier, given or calibrated; ``None`` before it is calibrated."""
        return self._run.mechanism.noise_multiplier if self._run.mechanism else self._run.settings.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """The largest norm of what one unit adds to the sum of gradients in the next step.

        `AdaptiveClipping` moves it, by a count that is released with noise: so it may be looked at.
        """
        return self._run.clipping.max_grad_norm

    @property
    def sample_rate(self) -> float | None:
        """The probability of a unit to be in a logical batch; ``None`` before the training data is known."""
        return self._run.mechanism.sample_rate if self._run.mechanism else None

    @property
    def unit(self) -> str | None:
        """For adding or removing what epsilon is: an ``"example"``, or a ``"user"`` with all of theirs.

        ``None`` before the training data is known.
        """
        return self._run.mechanism.unit if self._run.mechanism else None

    @property
    def num_releases(self) -> int:
        """Logical batches released from so far, through resumes: noisy steps, or draws under manual optimization."""
        return self._run.ledger.num_releases

    @property
    def private_statistics(self) -> dict[str, float] | None:
        """Norms, clipped share and loss of the last logical batch; ``None`` unless they were asked for.

        They are NOT private: they depend on single examples, without noise.
        """
        return self._run.statistics.values() if self._run.statistics else None

    @property
    def claim(self) -> str:
        """What `epsilon` says, and what it takes for granted: a sentence or two, to be shown beside it."""
        run = self._run
        unit = run.mechanism.unit if run.mechanism else "example"
        target = run.settings.target_epsilon
        spent, accountant = run.ledger.phases, run.budget.accountant
        return claim(spent, accountant, target_epsilon=target, epsilon=self.epsilon, unit=unit)

    def record(self) -> Record | None:
        """Return the facts about this run, for reports; ``None`` before it has seen its training data."""
        return self._run.record()

    def releases(self) -> dict[Release, int]:
        """Return how many releases of each kind there were, through resumes."""
        return self._run.ledger.counts

    @property
    def budget(self) -> PrivacyBudget:
        """What is spent and left in the present fit.

        Raises:
            PrivacyError: Before the fit has seen its training data.
        """
        return self._run.budget
