"""What every private strategy is given, and what it checks of a trainer.

Owns: the arguments that users give, which the docstring of `DPStrategy` explains. Does not own: the checks of their
values (``settings``), or which strategy of Lightning is made private.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout

from lightning_dp.accounting import Accountant
from lightning_dp.clipping import Clipping
from lightning_dp.schedule import Stage
from lightning_dp.strategies import checks
from lightning_dp.strategies.ending import EndingTogether
from lightning_dp.strategies.settings import PrivacySettings

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


@dataclass(frozen=True)
class Starting:
    """How processes are started, and talk: arguments of Lightning's strategies, explained at `DPStrategy`."""

    process_group_backend: str | None
    timeout: timedelta | None
    start_method: StartMethod


class PrivateStrategy(EndingTogether):
    """To be mixed into a strategy of Lightning, before it: the arguments are those of `DPStrategy`."""

    def __init__(
        self,
        *,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        noise_multiplier: float | None = None,
        max_grad_norm: float | None = None,
        clipping: str | Clipping = "flat",
        max_physical_batch_size: int | Literal["auto"] | None = None,
        accountant: str | Accountant = "prv",
        loss_reduction: str = "mean",
        self_check: bool = True,
        clipping_engine: str = "book",
        schedule: Sequence[Stage] = (),
        changed_settings: str = "refuse",
        private_statistics: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: StartMethod = "popen",
    ) -> None:
        self._begin_processes(Starting(process_group_backend, timeout, start_method))
        settings = PrivacySettings(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            max_physical_batch_size=max_physical_batch_size,
            accountant=accountant,
            loss_reduction=loss_reduction,
            self_check=self_check,
            clipping_engine=clipping_engine,
            schedule=tuple(schedule),
            changed_settings=changed_settings,
            private_statistics=private_statistics,
        )
        self._begin_run(settings)

    @abstractmethod
    def _begin_processes(self, starting: Starting) -> None:
        """Construct the strategy of Lightning."""

    @abstractmethod
    def _setup_plainly(self, trainer: pl.Trainer) -> None:
        """Do what that strategy does to set up."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Check what will be trained."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            checks.check_trainer(trainer)
            checks.check_not_flattened(self._module)
            if self._module.automatic_optimization:  # otherwise it is not known yet which layers see private data
                checks.check_module(self._module)
        self._setup_plainly(trainer)
        if fitting:
            checks.check_optimizers(self.optimizers, trainer.gradient_clip_val)
            checks.trained_parameters(self._module, self.optimizers)
