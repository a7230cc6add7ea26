"""Processes that go on from the present one, by ``start_method="spawn"``, ``"fork"`` or ``"forkserver"``.

Owns: that the process which started them knows afterwards what they have released. Does not own: the start itself
(Lightning).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn

_KEY = "lightning_dp"


class PrivateLauncher(_MultiProcessingLauncher):
    """Brings the run of the first process back, with weights and metrics.

    Guarantee: a fit makes its releases in the processes that are started; the ledger here counts them afterwards. After
    an exception there is nothing to bring back: then only checkpoints and journals know what was released, and the run
    here refuses to go on or to tell an epsilon.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the processes, and wait for them."""
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except BaseException:
            if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
                self._strategy._run.is_lost = True  # type: ignore[attr-defined]
            raise

    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return what Lightning brings back, and the run."""
        run = trainer.strategy._run  # type: ignore[attr-defined]
        return {**super().get_extra_results(trainer), _KEY: pickle.dumps(run)}

    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        """Take over what was brought back."""
        trainer.strategy._run.take_over(pickle.loads(extra.pop(_KEY)))  # type: ignore[attr-defined]
        super().update_main_process_results(trainer, extra)
