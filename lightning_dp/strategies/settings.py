"""The arguments of a private strategy, checked, and the plan of a fit that follows from them.

Owns: the meaning of the arguments: delta, sample rate, number of steps, calibrated noise. Does not own: the hooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.utils.data import DataLoader

from lightning_dp.accounting import Accountant, Ledger, calibrate_noise_multiplier, compute_epsilon, resolve_accountant
from lightning_dp.accounting.delta import delta_for
from lightning_dp.clipping import Clipping, resolve_clipping
from lightning_dp.data import largest_draw
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism import Mechanism


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
    accountant: str
    loss_reduction: str
    self_check: bool
    clipping_engine: str

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
        size = self.max_physical_batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise PrivacyConfigurationError(
                f"max_physical_batch_size={size!r}: expected a positive integer, or None for the loader's batch_size."
            )
        self.resolved_clipping()
        self.resolved_accountant()

    def physical_batch_size(self, batch_size: int) -> int:
        """Return the most examples to process at a time, for a dataloader of this batch size."""
        return 1 if self.clipping_engine == "loop" else self.max_physical_batch_size or batch_size

    def undivided_batch_size(self, num_examples: int, sample_rate: float) -> int:
        """Return the size of a batch that holds a whole logical batch, as manual optimization needs it.

        Raises:
            PrivacyConfigurationError: If the settings divide logical batches.
        """
        size = largest_draw(num_examples, sample_rate)
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

    def delta(self, num_examples: int) -> float:
        """Return delta for N examples: as given, else 1 / (10 N).

        Raises:
            PrivacyConfigurationError: If it is 1/N or more.
        """
        return delta_for(self.target_delta, num_examples)

    def plan(
        self,
        loader: DataLoader[object],
        world_size: int,
        planned_steps: int | None,
        ledger: Ledger,
        releases_per_draw: int = 1,
    ) -> Mechanism:
        """Return the mechanism of a fit.

        Args:
            loader: The user's dataloader; its batch size is the expected batch size of one process.
            world_size: Number of processes.
            planned_steps: Logical batches planned in all; ``None`` if the trainer has no limit.
            ledger: Releases made before.
            releases_per_draw: Noisy gradients released from one logical batch.

        Raises:
            PrivacyConfigurationError: If batch size, noise, target and steps do not go together.
        """
        num_examples, batch_size = len(loader.dataset), loader.batch_size or 0  # type: ignore[arg-type]
        expected = batch_size * world_size
        if expected > num_examples:
            raise PrivacyConfigurationError(
                f"batch_size={batch_size} on {world_size} process(es) with N={num_examples} training examples: "
                f"the sample rate would be {expected / num_examples:.3g}, expected at most 1. Use a batch_size of at "
                f"most {num_examples // world_size}; the memory of a step is set by max_physical_batch_size."
            )
        rate = expected / num_examples
        delta = self.delta(num_examples)
        several = math.sqrt(releases_per_draw)
        noise = self._noise(rate, delta, planned_steps, ledger, several)
        self._check_first_step(noise, rate, delta, planned_steps, ledger, several)
        return Mechanism(noise, self.resolved_clipping(), rate, float(expected), releases_per_draw)

    def _noise(self, rate: float, delta: float, planned_steps: int | None, ledger: Ledger, several: float) -> float:
        """Return the noise multiplier of each release; all from one draw count as one with ``1 / several`` of it."""
        if self.noise_multiplier is not None:
            return float(self.noise_multiplier)
        assert self.target_epsilon is not None, "checked with the arguments"
        if ledger.num_releases:
            return several * _noise_so_far(ledger, rate)
        if planned_steps is None:
            raise PrivacyConfigurationError(
                "the noise cannot be calibrated without a planned number of steps: the trainer has max_epochs=-1 and "
                "max_steps=-1. Give the Trainer max_epochs or max_steps, or give noise_multiplier to DPStrategy."
            )
        return several * self._calibrated(self.target_epsilon, rate, delta, planned_steps)

    def _calibrated(self, target_epsilon: float, rate: float, delta: float, num_steps: int) -> float:
        return calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=delta,
            sample_rate=rate,
            num_steps=num_steps,
            accountant=self.accountant,
        )

    def _check_first_step(
        self, noise: float, rate: float, delta: float, planned_steps: int | None, ledger: Ledger, several: float
    ) -> None:
        """Refuse a budget that does not allow a single step, and say what would."""
        if self.target_epsilon is None or ledger.num_releases or self.noise_multiplier is None:
            return
        first = compute_epsilon(
            noise_multiplier=noise / several, sample_rate=rate, num_steps=1, delta=delta, accountant=self.accountant
        )
        if first <= self.target_epsilon:
            return
        steps = planned_steps or 1
        enough = several * self._calibrated(self.target_epsilon, rate, delta, steps)
        raise PrivacyConfigurationError(
            f"target_epsilon={self.target_epsilon:g} is too small for a single step with noise_multiplier={noise:g} at "
            f"sample rate {rate:.4g}, which spends epsilon {first:.4g} at delta {delta:.3g}. Use noise_multiplier="
            f"{enough:.4g} for {steps} step(s), or a target_epsilon of at least {first:.4g}."
        )


def _noise_so_far(ledger: Ledger, rate: float) -> float:
    """Return the noise multiplier that an earlier fit was calibrated to: one budget, one noise.

    Raises:
        PrivacyConfigurationError: If the sample rate has changed since.
    """
    same_rate = [phase.noise_multiplier for phase in ledger.phases if math.isclose(phase.sample_rate, rate)]
    if not same_rate:
        before = ", ".join(f"{phase.sample_rate:.6g}" for phase in ledger.phases)
        raise PrivacyConfigurationError(
            f"the sample rate is now {rate:.6g} and was {before} in the {ledger.num_releases} releases made before: "
            "the noise calibrated then does not fit. Use the same dataset and batch_size, or give noise_multiplier; "
            "earlier releases are accounted in any case."
        )
    return max(same_rate)


def _check_number(
    name: str, value: float | None, expected: str, low: float, high: float, *, low_open: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value >= high or (low_open and value == low):
        raise PrivacyConfigurationError(f"{name}={value!r}: expected {expected}.")
