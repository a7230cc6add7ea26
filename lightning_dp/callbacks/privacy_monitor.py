"""`PrivacyMonitor`: shows the budget while a fit runs, and a summary at its end."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lightning_dp.callbacks.strategy import private_strategy
from lightning_dp.summary import print_summary

_REFRESH, _RAREST = 1.0, 5.0  # seconds between two values for the progress bar, at least and at most
_SHARE = 0.001  # of the time that they take, within these limits


class PrivacyMonitor(pl.Callback):
    """Logs ``privacy/epsilon`` and ``privacy/steps_left``, also on the progress bar, and prints a summary at the end.

    ``privacy/epsilon`` is an upper bound looked up at the next of 64 knots, at most a few per cent above the exact one,
    which the summary and ``strategy.epsilon`` give. ``privacy/steps_left`` is logged if there is a ``target_epsilon``.
    With `AdaptiveClipping` also ``privacy/max_grad_norm``, the bound as it was moved by the last step.
    With ``DPStrategy(private_statistics=True)`` also ``private/clipped_share``, ``private/grad_norm`` (the median,
    before clipping) and ``private/train_loss``: epsilon does not cover whoever sees these.

    Args:
        summary: Whether to print the summary when the fit ends.
    """

    def __init__(self, summary: bool = True) -> None:
        super().__init__()
        self.summary = summary
        self._logged, self._pause = 0.0, _REFRESH

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is spent and what is left, if somebody is going to look.

        A value takes a millisecond of Lightning's to log, so this is done when a logger is due, and else every second
        to five, for the progress bar: Lightning keeps the last value.
        """
        now, due = time.monotonic(), bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        if not due and batch_idx > 0 and now - self._logged < self._pause:
            return
        self._log(trainer, pl_module)
        self._logged = time.monotonic()
        self._pause = max(_REFRESH, min((self._logged - now) / _SHARE, _RAREST))

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = private_strategy(trainer, self)
        budget = strategy.budget
        pl_module.log("privacy/epsilon", budget.epsilon_at_most, on_step=True, prog_bar=True, batch_size=1)
        if budget.releases_left is not None:
            pl_module.log("privacy/steps_left", float(budget.releases_left), on_step=True, prog_bar=True, batch_size=1)
        if strategy._run.bound is not None:
            pl_module.log("privacy/max_grad_norm", strategy.max_grad_norm, on_step=True, batch_size=1)
        for name, value in (strategy.private_statistics or {}).items():
            pl_module.log(f"private/{name}", value, on_step=True, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary."""
        if self.summary:
            self._print(trainer)

    @rank_zero_only
    def _print(self, trainer: pl.Trainer) -> None:
        print_summary(private_strategy(trainer, self))
