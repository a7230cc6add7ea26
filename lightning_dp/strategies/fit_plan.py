"""The plan of a fit: which mechanism every step has, and the budget they are booked in.

Owns: the noise, given, kept from before or calibrated, and the refusal of what does not go together. Does not own: the
searches (``accounting``), the comparison of terms (``terms``), or the steps themselves (``run``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dp.accounting import Accountant, Journal, Ledger, RDPFilter, calibrate, greatest_epsilon
from lightning_dp.accounting.delta import delta_for
from lightning_dp.budget import PrivacyBudget
from lightning_dp.data import Units
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism import Mechanism
from lightning_dp.schedule import Schedule
from lightning_dp.strategies.settings import PrivacySettings
from lightning_dp.strategies.terms import Terms


def present_terms(
    settings: PrivacySettings, units: Units, sample_rate: float, ledger: Ledger, agreed: Mapping[str | None, Terms]
) -> Terms:
    """Return the terms that the user's settings and data come to.

    Args:
        settings: The arguments of the strategy.
        units: What is drawn.
        sample_rate: Without a schedule.
        ledger: Releases made before.
        agreed: Terms under which something was released, by partition.
    """
    delta = settings.delta(units)
    if settings.target_delta is None:  # a default one must suit every dataset that was released from
        # Of what only a journal tells there are no terms.
        others = [delta_for(None, release.num_units) for release in ledger.counts if release.num_units]
        delta = min([delta, *others, *(terms.delta for terms in agreed.values())])
    accountant = settings.accountant_for(delta)
    return Terms(
        num_units=units.num_units,
        unit=units.unit,
        partition=units.partition,
        sample_rate=sample_rate,
        delta=delta,
        noise_multiplier=settings.noise_multiplier or 0.0,
        schedule=settings.schedule,
        filter_target=settings.target_epsilon if accountant.adaptive else None,
        filter_order=accountant.order if isinstance(accountant, RDPFilter) else None,
    )


@dataclass(frozen=True)
class FitPlan:
    """All that noise and budget of a fit follow from.

    Args:
        settings: The arguments of the strategy.
        terms: Of this fit; its noise multiplier counts only if the user gave one.
        agreed: Terms under which something was released, by partition, the latest last.
        ledger: Releases made before.
        step: The step that comes next.
        planned_steps: Logical batches planned in all, from step 0 on; ``None`` if the trainer has no limit.
        releases_per_draw: Noisy gradients released from one logical batch.
    """

    settings: PrivacySettings
    terms: Terms
    agreed: Mapping[str | None, Terms]
    ledger: Ledger
    step: int
    planned_steps: int | None
    releases_per_draw: int = 1

    @property
    def before(self) -> Terms | None:
        """The terms under which something was released from data that may have units in common; ``None`` without any.

        Data of which nothing is said may be of any partition.
        """
        same = self.agreed.get(self.terms.partition)
        anywhere = self.terms.partition is None and self.agreed
        return list(self.agreed.values())[-1] if same is None and anywhere else same

    def settled(self, journal: Journal) -> tuple[Schedule, PrivacyBudget]:
        """Return the mechanisms and the budget of the fit, by an accountant that another one agrees with.

        Args:
            journal: The ledger's record on disk.

        Raises:
            PrivacyConfigurationError: If batch size, noise, target and steps do not go together, if the terms have
                changed and the user did not say that they may, or if the unit has.
            PrivacyBudgetExceeded: If nothing is left that noise could be calibrated to.
        """
        accountant = self.settings.accountant_for(self.terms.delta)
        schedule, budget = self._settled_by(accountant, journal)
        trusted = budget.trusted_accountant()
        return (schedule, budget) if trusted is accountant else self._settled_by(trusted, journal)

    def sentence(self, mechanism: Mechanism, budget: PrivacyBudget) -> str:
        """Say which noise was calibrated; nothing, if it was given or kept from before."""
        if self.settings.noise_multiplier is not None or self.ledger.num_releases:
            return ""
        steps = (budget.planned_steps or 0) - budget.step
        several, stages = mechanism.releases_per_draw, len(self.settings.schedule)
        return (
            f"Privacy: noise_multiplier {mechanism.noise_multiplier:.4g} calibrated to epsilon "
            f"{budget.target_epsilon:g} at delta {budget.delta:.3g} for {steps} steps"
            f"{f' of {several} releases each' if several > 1 else ''} at sample rate {mechanism.sample_rate:.4g}"
            f"{f', both varied in {stages} stages' if stages else ''}."
        )

    def _settled_by(self, accountant: Accountant, journal: Journal) -> tuple[Schedule, PrivacyBudget]:
        schedule = self._schedule(self._noise_multiplier(accountant))
        budget = PrivacyBudget(
            schedule,
            accountant,
            self.ledger,
            journal,
            delta=self.terms.delta,
            target_epsilon=self.settings.target_epsilon,
            planned_steps=self.planned_steps,
            step=self.step,
        )
        return schedule, budget

    def _noise_multiplier(self, accountant: Accountant) -> float:
        given, before = self.settings.noise_multiplier, self.before
        delta_is_given = self.settings.target_delta is not None
        changes = []
        if before is not None:
            changes = self.terms.differences(before, noise_is_given=given is not None, delta_is_given=delta_is_given)
        self._check(changes)
        if given is not None:
            self._check_first_step(accountant, float(given))
            return float(given)
        if before is not None and not changes:
            return before.noise_multiplier  # one budget, one noise
        return self._calibrated(accountant)

    def _check(self, changes: list[str]) -> None:
        made = self.ledger.num_releases
        for unit in {release.unit for release in self.ledger.counts} - {self.terms.unit}:
            raise PrivacyConfigurationError(
                f"privacy is now per {self.terms.unit} and was per {unit} in the {made} releases made before: there is "
                f"no one claim that covers both. Begin a new run, or go on per {unit}: PrivateDataset(user_ids=...) "
                "makes it per user."
            )
        if changes and self.settings.changed_settings == "refuse":
            raise PrivacyConfigurationError(
                f"{'; '.join(changes)}, in the {made} releases made before. Go on as before, or say "
                "DPStrategy(changed_settings='new_phase') to have what follows accounted as another phase: earlier "
                "releases count in any case, and noise that is not given is calibrated to what is left of the budget."
            )
        target = self.terms.filter_target
        for fixed in {terms.filter_target for terms in self.agreed.values()} - {target}:
            raise PrivacyConfigurationError(
                f"target_epsilon={target} of accountant='rdp_filter' was {fixed} in the {made} releases made before: a "
                "filter holds for the target that was fixed before the first release. Keep target and accountant, or "
                "begin a new run."
            )
        order = self.terms.filter_order
        for fixed in {terms.filter_order for terms in self.agreed.values()} - {order}:
            raise PrivacyConfigurationError(
                f"the order of accountant='rdp_filter' is now {order} and was {fixed} in the {made} releases made "
                "before: a filter holds for the order that was fixed before the first release. It follows from target "
                f"and delta: keep both, or give accountant=lightning_dp.accounting.RDPFilter({fixed})."
            )

    def _calibrated(self, accountant: Accountant) -> float:
        """Return a noise multiplier with which the remaining steps spend what is left of the target."""
        target = self.settings.target_epsilon
        assert target is not None, "checked with the arguments"
        if self.planned_steps is None and self.settings.noise_multiplier is None:
            raise PrivacyConfigurationError(
                "the noise cannot be calibrated without a planned number of steps: the trainer has max_epochs=-1 and "
                "max_steps=-1. Give the Trainer max_epochs or max_steps, or give noise_multiplier to DPStrategy."
            )
        return calibrate(
            accountant,
            lambda noise: self.ledger.concerning(self._schedule(noise).releases(self.step, self._remaining)),
            target_epsilon=target,
            delta=self.terms.delta,
        )

    @property
    def _remaining(self) -> int:
        return max(1, (self.planned_steps or 1) - self.step)

    def _check_first_step(self, accountant: Accountant, noise_multiplier: float) -> None:
        """Refuse a budget that does not allow a single step, and say what would."""
        target, delta = self.settings.target_epsilon, self.terms.delta
        if target is None or self.ledger.num_releases:
            return
        schedule = self._schedule(noise_multiplier)
        first = greatest_epsilon(accountant, self.ledger.histories(schedule.releases(self.step, 1)), delta)
        if first <= target:
            return
        raise PrivacyConfigurationError(
            f"target_epsilon={target:g} is too small for a single step with noise_multiplier={noise_multiplier:g} at "
            f"sample rate {schedule.at(self.step).sample_rate:.4g}, which spends epsilon {first:.4g} at delta "
            f"{delta:.3g}. Use noise_multiplier={self._calibrated(accountant):.4g} for {self._remaining} step(s), or a "
            f"target_epsilon of at least {first:.4g}."
        )

    def _schedule(self, noise_multiplier: float) -> Schedule:
        terms = self.terms
        mechanism = Mechanism(
            noise_multiplier,
            self.settings.resolved_clipping(),
            terms.sample_rate,
            terms.sample_rate * terms.num_units,
            self.releases_per_draw,
            terms.num_units,
            terms.unit,
            terms.partition,
        )
        return Schedule(mechanism, terms.schedule)
