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
from torch import nn

from lightning_dp.accounting import Journal, Ledger
from lightning_dp.budget import PrivacyBudget
from lightning_dp.data import PoissonLoader, check_dataloader
from lightning_dp.errors import PrivacyError
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_step import PrivateStep
from lightning_dp.strategies.planning import planned_steps
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
        self.mechanism: Mechanism | None = None
        self._budget: PrivacyBudget | None = None
        self._journal = Journal()
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
        user = check_dataloader(dataloader)
        planned = planned_steps(trainer, len(user))
        mechanism = self.mechanism = self.settings.plan(user, world_size, planned, self.ledger)
        self._budget = PrivacyBudget(
            mechanism,
            self.settings.resolved_accountant(),
            self.ledger,
            self._journal,
            delta=self._smallest_delta(len(user.dataset)),  # type: ignore[arg-type]
            target_epsilon=self.settings.target_epsilon,
            planned_steps=planned,
        )
        self.loader = PoissonLoader(
            user,
            sample_rate=mechanism.sample_rate,
            num_batches=len(user),
            max_physical_batch_size=self.settings.physical_batch_size(user.batch_size or 1),
            random=self._sampling,
        )
        return self.loader

    def _smallest_delta(self, num_examples: int) -> float:
        """Return delta; a default one only shrinks, since it must suit every dataset that was released from."""
        delta = self.settings.delta(num_examples)
        return min(delta, self._budget.delta) if self._budget else delta

    def private_step(self, trained: Mapping[str, nn.Parameter]) -> PrivateStep:
        """Return the buffers for these parameters."""
        assert self.mechanism is not None, "settled with the dataloader, before the first step"
        mean_loss = self.settings.loss_reduction == "mean"
        return PrivateStep(trained, self.mechanism, self._noise, mean_loss=mean_loss)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Put the ledger into a checkpoint that is about to be saved."""
        checkpoint[_CHECKPOINT_KEY] = {"version": 1, "ledger": self.ledger.state_dict(), "delta": self.delta}

    def keep_journal_beside(self, path: Path) -> None:
        """Keep the journal beside a checkpoint that was saved, if that is a local directory."""
        if path.parent.is_dir():
            self._journal.add_directory(path.parent)

    def resume(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Count every release that a checkpoint and the journals beside it know of."""
        if _CHECKPOINT_KEY in checkpoint:
            self.ledger.merge(checkpoint[_CHECKPOINT_KEY]["ledger"])
        elif checkpoint.get("global_step"):
            _log.warning("%s holds no record of releases: what its training spent is not in this run's epsilon.", path)
        self._journal.read(path.parent, self.ledger)
        self.keep_journal_beside(path)  # whoever resumes from there again must find what this run releases

    def close(self) -> None:
        """Leave the exact number of releases on disk."""
        self._journal.close(self.ledger)
