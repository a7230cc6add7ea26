"""The arguments of a private strategy, checked, and the plan of a fit that follows from them.

Owns: the meaning of the arguments: delta, sample rate, number of steps, calibrated noise. Does not own: the hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_dp.accounting import Accountant, Ledger, calibrate, greatest_epsilon, resolve_accountant
from lightning_dp.accounting.delta import delta_for
from lightning_dp.clipping import Clipping, resolve_clipping
from lightning_dp.data import Units, largest_draw
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism import Mechanism
from lightning_dp.schedule import Schedule, Stage
from lightning_dp.strategies.terms import Terms


@dataclass(frozen=True)
class PrivacySettings:
    """The arguments of ``DPStrategy``; see there.

    Raises:
        PrivacyConfigurationError: If an argument is not what it should be, naming it.
    """

    target_epsilon: float | None
    target_delta: float | None
    noise_multiplier: float | None
    max_grad_norm: float
    clipping: str
    max_physical_batch_size: int | None
    accountant: str | Accountant
    loss_reduction: str
    self_check: bool
    clipping_engine: str
    schedule: tuple[Stage, ...] = ()
    changed_settings: str = "refuse"
    private_statistics: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that can be checked without model and data."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise PrivacyConfigurationError(
                "neither target_epsilon nor noise_multiplier is given: expected target_epsilon (the noise is then "
                "calibrated to the planned number of steps), noise_multiplier (epsilon is then reported), or both."
            )
        _check_number("target_epsilon", self.target_epsilon, "a positive number", 0, math.inf, low_open=True)
        _check_number("target_delta", self.target_delta, "a number between 0 and 1, below 1/N", 0, 1, low_open=True)
        _check_number("noise_multiplier", self.noise_multiplier, "a number of at least 0", 0, math.inf)
        if self.noise_multiplier == 0 and self.target_epsilon is not None:
            raise PrivacyConfigurationError(
                f"noise_multiplier=0 with target_epsilon={self.target_epsilon}: without noise epsilon is infinite. "
                "Leave out noise_multiplier to have it calibrated, or target_epsilon to run without privacy."
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise PrivacyConfigurationError(f"loss_reduction={self.loss_reduction!r}: expected 'mean' or 'sum'.")
        if self.clipping_engine not in ("book", "loop"):
            raise PrivacyConfigurationError(f"clipping_engine={self.clipping_engine!r}: expected 'book' or 'loop'.")
        if self.changed_settings not in ("refuse", "new_phase"):
            raise PrivacyConfigurationError(
                f"changed_settings={self.changed_settings!r}: expected 'refuse' or 'new_phase'."
            )
        for stage in self.schedule:
            if not isinstance(stage, Stage):
                raise PrivacyConfigurationError(f"schedule: {stage!r} is one of its stages, expected a Stage.")
        size = self.max_physical_batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise PrivacyConfigurationError(
                f"max_physical_batch_size={size!r}: expected a positive integer, or None for the loader's batch_size."
            )
        self.resolved_clipping()
        if self.resolved_accountant().adaptive and self.target_epsilon is None:
            raise PrivacyConfigurationError(
                f"accountant={self.accountant!r} without target_epsilon: a filter is fixed by its target before the "
                "first release. Give target_epsilon."
            )

    def physical_batch_size(self, batch_size: int) -> int:
        """Return the most examples to process at a time, for a dataloader of this batch size."""
        return 1 if self.clipping_engine == "loop" else self.max_physical_batch_size or batch_size

    def undivided_batch_size(self, num_units: int, sample_rate: float) -> int:
        """Return the size of a batch that holds a whole logical batch, as manual optimization needs it.

        Raises:
            PrivacyConfigurationError: If the settings divide logical batches.
        """
        size = largest_draw(num_units, sample_rate)
        if self.clipping_engine == "loop" or (self.max_physical_batch_size or size) < size:
            limit = "clipping_engine='loop'"
            if self.clipping_engine == "book":
                limit = f"max_physical_batch_size={self.max_physical_batch_size}"
            raise PrivacyConfigurationError(
                f"{limit} with automatic_optimization=False: a training step that steps its optimizers itself runs on "
                f"a whole logical batch, of up to {size} samples here. Leave the setting out, or use automatic "
                "optimization."
            )
        return size

    def resolved_clipping(self) -> Clipping:
        """Return the clipping that the arguments name."""
        return resolve_clipping(self.clipping, self.max_grad_norm)

    def resolved_accountant(self) -> Accountant:
        """Return the accountant that the arguments name."""
        return resolve_accountant(self.accountant)

    def accountant_for(self, delta: float) -> Accountant:
        """Return that accountant, with what it fixes by the target before the first release."""
        accountant = self.resolved_accountant()
        return accountant if self.target_epsilon is None else accountant.for_target(self.target_epsilon, delta)

    def delta(self, units: Units) -> float:
        """Return delta for N units: as given, else 1 / (10 N).

        Raises:
            PrivacyConfigurationError: If it is 1/N or more.
        """
        return delta_for(self.target_delta, units.num_units, units.unit)

    def sample_rate(self, units: Units, batch_size: int, world_size: int) -> float:
        """Return q for a dataloader whose batch size is the expected number of examples in one process.

        Raises:
            PrivacyConfigurationError: If it is above 1.
        """
        expected = batch_size * world_size / units.examples_per_unit
        if expected > units.num_units:
            raise PrivacyConfigurationError(
                f"batch_size={batch_size} on {world_size} process(es) with N={units.num_units} training {units.unit}s: "
                f"the sample rate would be {expected / units.num_units:.3g}, expected at most 1. Use a batch_size of "
                f"at most {units.num_units * units.examples_per_unit // world_size}; the memory of a step is set by "
                "max_physical_batch_size."
            )
        return expected / units.num_units

    def plan(
        self,
        terms: Terms,
        before: Terms | None,
        ledger: Ledger,
        accountant: Accountant,
        *,
        step: int,
        planned_steps: int | None,
        releases_per_draw: int = 1,
    ) -> Schedule:
        """Return the mechanisms of a fit.

        Args:
            terms: Of this fit; its noise multiplier counts only if the user gave one.
            before: Under which something was released from the same data; ``None`` if nothing was.
            ledger: Releases made before.
            accountant: Whose epsilon counts.
            step: The step that comes next.
            planned_steps: Logical batches planned in all, from step 0 on; ``None`` if the trainer has no limit.
            releases_per_draw: Noisy gradients released from one logical batch.

        Raises:
            PrivacyConfigurationError: If batch size, noise, target and steps do not go together, or if the terms have
                changed and the user did not say that they may.
        """
        changes = terms.differences(before, noise_is_given=self.noise_multiplier is not None) if before else []
        self._check_changes(changes, ledger)
        if before is not None and terms.filter_target != before.filter_target:
            raise PrivacyConfigurationError(
                f"target_epsilon={terms.filter_target} of accountant='rdp_filter' was {before.filter_target} in the "
                f"{ledger.num_releases} releases made before: a filter holds for the target that was fixed before the "
                "first release. Keep target and accountant, or begin a new run."
            )
        remaining = None if planned_steps is None else max(1, planned_steps - step)

        def schedule(noise_multiplier: float) -> Schedule:
            mechanism = Mechanism(
                noise_multiplier,
                self.resolved_clipping(),
                terms.sample_rate,
                terms.sample_rate * terms.num_units,
                releases_per_draw,
                terms.num_units,
                terms.unit,
                terms.partition,
            )
            return Schedule(mechanism, terms.schedule)

        if self.noise_multiplier is not None:
            planned = schedule(float(self.noise_multiplier))
            self._check_first_step(planned, schedule, ledger, accountant, terms.delta, step, remaining or 1)
            return planned
        if before is not None and not changes:
            return schedule(before.noise_multiplier)  # one budget, one noise
        return schedule(self._calibrated(schedule, ledger, accountant, terms.delta, step, remaining))

    def _check_changes(self, changes: list[str], ledger: Ledger) -> None:
        if changes and self.changed_settings == "refuse":
            raise PrivacyConfigurationError(
                f"{'; '.join(changes)}, in the {ledger.num_releases} releases made before. Go on as before, or say "
                "DPStrategy(changed_settings='new_phase') to have what follows accounted as another phase: earlier "
                "releases count in any case, and noise that is not given is calibrated to what is left of the budget."
            )

    def _calibrated(
        self,
        schedule: Callable[[float], Schedule],
        ledger: Ledger,
        accountant: Accountant,
        delta: float,
        step: int,
        remaining: int | None,
    ) -> float:
        """Return a noise multiplier with which the remaining steps spend what is left of the target."""
        assert self.target_epsilon is not None, "checked with the arguments"
        if remaining is None:
            raise PrivacyConfigurationError(
                "the noise cannot be calibrated without a planned number of steps: the trainer has max_epochs=-1 and "
                "max_steps=-1. Give the Trainer max_epochs or max_steps, or give noise_multiplier to DPStrategy."
            )
        return calibrate(
            accountant,
            lambda noise: ledger.histories(schedule(noise).releases(step, remaining)),
            target_epsilon=self.target_epsilon,
            delta=delta,
        )

    def _check_first_step(
        self,
        planned: Schedule,
        schedule: Callable[[float], Schedule],
        ledger: Ledger,
        accountant: Accountant,
        delta: float,
        step: int,
        remaining: int,
    ) -> None:
        """Refuse a budget that does not allow a single step, and say what would."""
        if self.target_epsilon is None or ledger.num_releases:
            return
        first = greatest_epsilon(accountant, ledger.histories(planned.releases(step, 1)), delta)
        if first <= self.target_epsilon:
            return
        enough = self._calibrated(schedule, ledger, accountant, delta, step, remaining)
        raise PrivacyConfigurationError(
            f"target_epsilon={self.target_epsilon:g} is too small for a single step with noise_multiplier="
            f"{self.noise_multiplier:g} at sample rate {planned.at(step).sample_rate:.4g}, which spends epsilon "
            f"{first:.4g} at delta {delta:.3g}. Use noise_multiplier={enough:.4g} for {remaining} step(s), or a "
            f"target_epsilon of at least {first:.4g}."
        )


def _check_number(
    name: str, value: float | None, expected: str, low: float, high: float, *, low_open: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value >= high or (low_open and value == low):
        raise PrivacyConfigurationError(f"{name}={value!r}: expected {expected}.")
