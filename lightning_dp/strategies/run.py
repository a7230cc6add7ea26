"""`PrivateRun`: what a private fit consists of, whatever strategy drives it.

Owns: the coupling of sampler, mechanism, ledger and budget, and what of them goes into checkpoints. Does not own:
Lightning's hooks (``dp``) or per-sample gradients (``bookkeeping``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp.accounting import Journal, Ledger
from lightning_dp.budget import PrivacyBudget
from lightning_dp.data import PoissonLoader, check_dataloader
from lightning_dp.errors import PrivacyError
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_step import PrivateStep
from lightning_dp.record import Record, TrainingRecord
from lightning_dp.strategies.planning import planned_steps
from lightning_dp.strategies.record import earlier_training, plain_record, record_of
from lightning_dp.strategies.settings import PrivacySettings

_log = logging.getLogger("lightning_dp")

_CHECKPOINT_KEY = "lightning_dp"


class PrivateRun:
    """The state of a run: it outlives a single fit, so that several fits add up.

    Guarantee: there is one mechanism, so what is sampled, noised and accounted agree; the ledger only grows.

    Args:
        settings: The checked arguments of the strategy.
    """

    def __init__(self, settings: PrivacySettings) -> None:
        self.settings, self.ledger = settings, Ledger()
        self.loader: PoissonLoader | None = None
        self._user: DataLoader[object] | None = None
        self.mechanism: Mechanism | None = None
        self._budget: PrivacyBudget | None = None
        self._journal = Journal()
        self.training: TrainingRecord | None = None
        self._noise, self._sampling = SecretRandom(), SecretRandom()

    @property
    def budget(self) -> PrivacyBudget:
        """The budget of the present fit.

        Raises:
            PrivacyError: Before the fit has seen its training data.
        """
        if self._budget is None:
            raise PrivacyError("the budget is known once a fit has seen its training data, and none has yet.")
        return self._budget

    @property
    def epsilon(self) -> float:
        """Epsilon spent by all releases so far."""
        return self.budget.epsilon if self.ledger.num_releases or self._budget else 0.0

    @property
    def delta(self) -> float | None:
        """The delta that epsilon is for, as far as it is known."""
        return self._budget.delta if self._budget else self.settings.target_delta

    def plan(self, dataloader: object, trainer: pl.Trainer, world_size: int) -> PoissonLoader:
        """Settle mechanism and budget for a train dataloader, and return the loader that samples it.

        Raises:
            PrivacyConfigurationError: If the dataloader, the settings and the trainer do not go together.
        """
        user = self._user = check_dataloader(dataloader)
        module, optimizers = trainer.lightning_module, len(trainer.strategy.optimizers)
        manual = not module.automatic_optimization
        mechanism = self.settle(trainer, world_size, steps_per_draw=max(1, optimizers), announce=not manual)
        rate, size = mechanism.sample_rate, self.settings.physical_batch_size(user.batch_size or 1)
        if manual:
            size = self.settings.undivided_batch_size(len(user.dataset), rate)  # type: ignore[arg-type]
        self.loader = PoissonLoader(
            user,
            sample_rate=rate,
            num_batches=len(user),
            max_physical_batch_size=size,
            random=self._sampling,
            constant_size=manual and optimizers > 1,
        )
        return self.loader

    def settle(
        self,
        trainer: pl.Trainer,
        world_size: int,
        *,
        releases_per_draw: int = 1,
        steps_per_draw: int = 1,
        announce: bool = True,
    ) -> Mechanism:
        """Settle mechanism and budget.

        Args:
            trainer: Gives the number of steps.
            world_size: Number of processes.
            releases_per_draw: Noisy gradients released from one logical batch.
            steps_per_draw: Optimizer steps in one training step, those without noise included.
            announce: Whether to say which noise was calibrated.
        """
        assert self._user is not None, "the dataloader comes first"
        planned = planned_steps(trainer, len(self._user), steps_per_draw)
        mechanism = self.settings.plan(self._user, world_size, planned, self.ledger, releases_per_draw)
        self._budget = PrivacyBudget(
            mechanism,
            self.settings.resolved_accountant(),
            self.ledger,
            self._journal,
            delta=self._smallest_delta(len(self._user.dataset)),  # type: ignore[arg-type]
            target_epsilon=self.settings.target_epsilon,
            planned_steps=planned,
        )
        self.mechanism = mechanism
        if announce:
            self._announce(mechanism, self._budget)
        return mechanism

    def _announce(self, mechanism: Mechanism, budget: PrivacyBudget) -> None:
        if mechanism.noise_multiplier == 0:
            _log.warning("noise_multiplier=0: this run is NOT private, its epsilon is infinite.")
        if self.settings.noise_multiplier is not None or self.ledger.num_releases:
            return
        several = mechanism.releases_per_draw
        rank_zero_info(
            f"Privacy: noise_multiplier {mechanism.noise_multiplier:.4g} calibrated to epsilon "
            f"{budget.target_epsilon:g} at delta {budget.delta:.3g} for {budget.planned_steps} steps"
            f"{f' of {several} releases each' if several > 1 else ''} at sample rate {mechanism.sample_rate:.4g}."
        )

    def _smallest_delta(self, num_examples: int) -> float:
        """Return delta; a default one only shrinks, since it must suit every dataset that was released from."""
        delta = self.settings.delta(num_examples)
        return min(delta, self._budget.delta) if self._budget and self.ledger.num_releases else delta

    def private_step(self, trained: Mapping[str, nn.Parameter]) -> PrivateStep:
        """Return the buffers for these parameters."""
        assert self.mechanism is not None, "settled with the dataloader, before the first step"
        mean_loss = self.settings.loss_reduction == "mean"
        return PrivateStep(trained, self.mechanism, self._noise, mean_loss=mean_loss)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Put the ledger into a checkpoint that is about to be saved."""
        state = {"version": 1, "ledger": self.ledger.state_dict(), "delta": self.delta}
        checkpoint[_CHECKPOINT_KEY] = {**state, **plain_record(self)}

    def record(self) -> Record | None:
        """Return the facts about this run, for reports; ``None`` before it has seen its training data."""
        return record_of(self)

    def keep_journal_beside(self, path: Path) -> None:
        """Keep the journal beside a checkpoint that was saved, if that is a local directory."""
        if path.parent.is_dir():
            self._journal.add_directory(path.parent)

    def resume(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Count every release that a checkpoint and the journals beside it know of."""
        if _CHECKPOINT_KEY in checkpoint:
            self.ledger.merge(checkpoint[_CHECKPOINT_KEY]["ledger"])
            self.training = self.training or earlier_training(checkpoint[_CHECKPOINT_KEY])
        elif checkpoint.get("global_step"):
            _log.warning("%s holds no record of releases: what its training spent is not in this run's epsilon.", path)
        self._journal.read(path.parent, self.ledger)
        self.keep_journal_beside(path)  # whoever resumes from there again must find what this run releases

    def close(self) -> None:
        """Leave the exact number of releases on disk."""
        self._journal.close(self.ledger)
