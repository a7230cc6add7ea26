"""`PrivacyBudgetStopping`: ends a fit cleanly when the next step would exceed the budget."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_dp.callbacks.strategy import private_strategy


class PrivacyBudgetStopping(pl.Callback):
    """Ends the fit when the next step would exceed ``target_epsilon``, in the middle of an epoch too.

    The budget goes before ``min_epochs`` and ``min_steps``. Without this callback `DPStrategy` raises
    `PrivacyBudgetExceeded` instead: the budget holds either way.

    Args:
        verbose: Whether to say so when the budget ends the fit.
    """

    def __init__(self, verbose: bool = True) -> None:
        super().__init__()
        self.verbose = verbose
        self._minimum: tuple[int | None, int | None] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step of a resumed fit whose budget is spent."""
        self._stop_if_spent(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step that fits."""
        self._stop_if_spent(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the trainer its minimum of epochs and steps back."""
        self._restore(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the trainer its minimum of epochs and steps back."""
        self._restore(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        strategy = private_strategy(trainer, self)
        if strategy.budget.releases_left != 0:
            return
        if self.verbose and not trainer.should_stop:
            rank_zero_info(
                f"Privacy: budget spent, epsilon {strategy.epsilon:.4g} of {strategy.budget.target_epsilon:g} at delta "
                f"{strategy.delta:.3g} after {strategy.num_releases} steps. Training stops."
            )
        trainer.should_stop = True
        loop = trainer.fit_loop
        if self._minimum is None:
            self._minimum = loop.min_epochs, loop.epoch_loop.min_steps
        loop.min_epochs, loop.epoch_loop.min_steps = 0, None

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._minimum is not None:
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = self._minimum
            self._minimum = None
