"""Fits of Lightning that wait for their turn: private ones, and the ordinary ones that they are compared with.

Owns: what of a trainer is set so that a fit can be measured, and the fair opponent: as many examples in a step, in
physical batches of the same size, by ``accumulate_grad_batches``. Does not own: where model, data and settings come
from (``configured``, examples/benchmarks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import BatchSampler, RandomSampler

from lightning_dp.benchmarking.baton import Baton, Facts
from lightning_dp.callbacks import (
    BiasOnlyFinetuning,
    PrivacyBudgetStopping,
    PrivacyMonitor,
    PrivacyReport,
    PublicPretraining,
)
from lightning_dp.data import Drawn, PhysicalBatch, PoissonLoader, check_dataloader
from lightning_dp.data.poisson import _with_batches
from lightning_dp.strategies import DPStrategy
from lightning_dp.strategies.checks import check_alone

_LEFT_OUT = (
    *(Checkpoint, ProgressBar, ModelSummary, PrivacyReport),  # they write or show
    *(EarlyStopping, Timer),  # they end a fit
    *(LearningRateMonitor, DeviceStatsMonitor),  # they need a logger
    BiasOnlyFinetuning,  # a row has it or not
    PublicPretraining,  # its steps are ordinary ones
)
_OF_PRIVATE_FITS = (PrivacyMonitor, PrivacyBudgetStopping)
_AMPLE = 10  # a training step under manual optimization may make several of the steps that are counted


class OrdinaryStrategy(SingleDeviceStrategy):
    """Ordinary training on one device, in physical batches of the user's dataloader.

    Args:
        device: The device.
        batch_size: Examples in a physical batch.
    """

    def __init__(self, device: Any, batch_size: int) -> None:
        super().__init__(device)
        self.batch_size = batch_size

    def process_dataloader(self, dataloader: object) -> object:
        """Replace the train dataloader by one of full steps of full physical batches, in random order."""
        user = check_dataloader(dataloader)
        data: Any = user.dataset
        assert self.lightning_module is not None, "the trainer connects the module first"
        step = self.batch_size * self.lightning_module.trainer.accumulate_grad_batches
        order = RandomSampler(data, num_samples=step * max(1, len(data) // step))
        batches: Any = BatchSampler(order, self.batch_size, drop_last=True)
        return _with_batches(user, batches)


class TakingTurns(pl.Callback):
    """Waits for its turn before each optimizer step, and counts what was processed in it.

    A turn lasts until the next one is waited for, so that all of a fit is in it: loading, other callbacks, Lightning.

    Args:
        baton: Whose turn it is.
    """

    def __init__(self, baton: Baton) -> None:
        self._baton = baton
        self._batches = self._examples = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is known of the fit."""
        if isinstance(trainer.strategy, DPStrategy):
            self._count_draws(trainer.strategy._run.loader)
        self._baton.ready(lambda: _facts(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait, if the batch is the first of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._baton.wait(self._batches, self._examples)
            self._batches = self._examples = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch of an ordinary fit."""
        if isinstance(trainer.strategy, OrdinaryStrategy):
            self._count(trainer.strategy.batch_size)

    def _count(self, examples: int) -> None:
        self._batches += 1
        self._examples += examples

    def _count_draws(self, loader: PoissonLoader | None) -> None:
        """Count what a private step takes from its loader; Lightning sees one batch, whatever that consists of."""
        assert loader is not None, "fit sets up the loader first"
        take, rows = loader.take, loader.units.examples_per_unit

        def counted() -> tuple[Drawn, Iterator[PhysicalBatch]]:
            drawn, others = take()
            self._count(drawn.num_real * rows)
            return drawn, self._counted(others, rows)

        setattr(loader, "take", counted)  # noqa: B010 - of this one object, in a process that ends with the measuring

    def _counted(self, batches: Iterator[PhysicalBatch], rows: int) -> Iterator[PhysicalBatch]:
        for batch in batches:
            self._count(batch.num_real * rows)
            yield batch


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        private: Whether privately.
        bias_only: Whether the biases alone.
        batch_size: Of an ordinary fit: examples in a physical batch.
        num_physical: Of an ordinary fit: physical batches in a step.
        steps: How many steps it may be asked for.
    """

    private: bool
    bias_only: bool = False
    batch_size: int = 1
    num_physical: int = 1
    steps: int = 1

    def against(self, private: Facts) -> Variant:
        """Return the ordinary training with the same physical batches and as many examples as a private one."""
        return Variant(False, self.bias_only, private.physical_batch_size, private.num_physical, self.steps)

    def trainer(
        self, make: Callable[..., pl.Trainer], settings: dict[str, Any], folder: str, baton: Baton
    ) -> pl.Trainer:
        """Return a trainer that waits for its turns.

        Args:
            make: Makes a trainer.
            settings: The arguments of a private fit's trainer.
            folder: Where it may write.
            baton: Whose turn it is.
        """
        callbacks = self._callbacks(settings.get("callbacks") or [])
        quiet = {**settings, **_STILL, "default_root_dir": folder, "max_steps": _AMPLE * self.steps, "callbacks": []}
        trainer = make(**quiet)
        check_alone(trainer, "a benchmark")
        if not self.private:  # on the device that the private one would be on
            ordinary = OrdinaryStrategy(trainer.strategy.root_device, self.batch_size)
            trainer = make(**{**quiet, "strategy": ordinary, "accumulate_grad_batches": self.num_physical})
        trainer.callbacks[:0] = [TakingTurns(baton), *callbacks]  # type: ignore[attr-defined] # its own: after these
        return trainer

    def _callbacks(self, given: Sequence[pl.Callback]) -> list[pl.Callback]:
        left_out = _LEFT_OUT if self.private else (*_LEFT_OUT, *_OF_PRIVATE_FITS)
        kept = [callback for callback in given if not isinstance(callback, left_out)]
        if not self.bias_only:
            return kept
        own = [callback.at_once() for callback in given if isinstance(callback, BiasOnlyFinetuning)]
        return [*(own or [BiasOnlyFinetuning()]), *kept]


_STILL: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    **dict.fromkeys(("limit_val_batches", "num_sanity_val_steps", "overfit_batches"), 0),
    **dict.fromkeys(("min_epochs", "min_steps", "max_time", "profiler"), None),
    "limit_train_batches": 1.0,
    "fast_dev_run": False,
    "max_epochs": -1,
}
"""Arguments of a trainer that writes and shows nothing, and does not end by itself."""


def _facts(trainer: pl.Trainer) -> Facts:
    strategy, parameters = trainer.strategy, list(trainer.lightning_module.parameters())
    size, count = 1, 1
    if isinstance(strategy, OrdinaryStrategy):
        size, count = strategy.batch_size, trainer.accumulate_grad_batches
    elif isinstance(strategy, DPStrategy) and strategy._run.loader is not None:
        loader, rows = strategy._run.loader, strategy._run.loader.units.examples_per_unit
        expected = strategy._run.schedule.base.expected_batch_size
        most = min(loader.max_physical_batch_size, max(1, round(expected)))
        size, count = most * rows, max(1, round(expected / most))
    return Facts(
        device=str(strategy.root_device),
        physical_batch_size=size,
        num_physical=count,
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_parameters=sum(p.numel() for p in parameters),
    )
