"""`PrivacyReport`: writes what a fit did, what it cost and what is not covered, beside the run's logs."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dp.callbacks.strategy import private_strategy
from lightning_dp.plain import from_plain, to_plain
from lightning_dp.record import Point, Watched
from lightning_dp.reporting import Report, check_filename, make_report, write_report
from lightning_dp.reporting.checkpoint import WATCHED_KEY

_log = logging.getLogger("lightning_dp")


class PrivacyReport(pl.Callback):
    """Writes a report at the end of each fit, and when one is ended by an exception.

    ``<filename>.json`` (its JSON Schema is `lightning_dp.reporting.schema`), ``<filename>.md`` and, if matplotlib is
    installed, ``<filename>.png`` are written beside the run's logs (``trainer.log_dir``), or into
    ``default_root_dir``. The report is about all releases of the run: a later fit writes it anew. What it needs is in
    every checkpoint: ``lightning-dp report CKPT`` makes it again.

    Guarantee: beyond what validation and its data tell, the report depends on the training data through noisy releases
    only, unless it says so in its first lines.

    Args:
        filename: Without folder and suffix.

    Raises:
        PrivacyConfigurationError: If ``filename`` is not such a name, or the trainer's strategy is not private.
    """

    def __init__(self, filename: str = "privacy_report") -> None:
        super().__init__()
        self.filename = check_filename(filename)
        self._watched = Watched()
        self._begun, self._folder = False, ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a strategy that has nothing to report."""
        if stage == "fit":
            private_strategy(trainer, self)
            # On every rank, which agree upon it: after an exception on one of them there would be no answer.
            self._begun, self._folder = False, trainer.log_dir or trainer.default_root_dir

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the history."""
        if not self._begun:
            self._begun = True
            hooks, callbacks = _own_hooks(pl_module), [type(c).__name__ for c in _foreign_callbacks(trainer)]
            self._watched = replace(
                self._watched,
                hooks=_joined(self._watched.hooks, hooks),
                callbacks=_joined(self._watched.callbacks, callbacks),
            )
            self._add("start", trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the names that were logged."""
        self._note_names(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note epsilon and the metrics of this validation."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        metrics = _validation_metrics(trainer)
        self._watched = replace(
            self._watched, validation_metrics=_joined(self._watched.validation_metrics, list(metrics))
        )
        self._add("validation", trainer, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the history, before the last checkpoint is saved."""
        self._note_names(trainer)
        self._add("end", trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report."""
        self._write(trainer)
        self._begun = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the report of what was released so far; a failure to do so does not hide the exception."""
        if not self._begun or not private_strategy(trainer, self).num_releases:
            return
        try:
            self._add("exception", trainer)
            self._write(trainer)
        except Exception as error:
            _log.error("The privacy report was not written: %s. Make it from a checkpoint: lightning-dp report", error)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, for the checkpoint."""
        return {WATCHED_KEY: to_plain(self._watched)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was seen before the checkpoint."""
        self._watched = from_plain(Watched, state_dict[WATCHED_KEY], "the history in the checkpoint")

    def report(self, trainer: pl.Trainer) -> Report | None:
        """Return the report as it is now; ``None`` if the training data was not seen yet.

        Args:
            trainer: Has the private strategy.
        """
        strategy = private_strategy(trainer, self)
        record = strategy.record()
        if record is None:
            return None
        return make_report(record, strategy.releases(), strategy.budget.accountant, self._watched)

    def _write(self, trainer: pl.Trainer) -> None:
        report = self.report(trainer) if trainer.is_global_zero else None
        if report is not None:
            files = write_report(report, self._folder, self.filename)
            rank_zero_info(f"Privacy: report written to {', '.join(files)}.")

    def _add(self, event: str, trainer: pl.Trainer, metrics: dict[str, float | None] | None = None) -> None:
        strategy = private_strategy(trainer, self)
        share = (strategy.private_statistics or {}).get("clipped_share")
        point = Point(event, trainer.global_step, strategy.num_releases, strategy.epsilon, metrics or {}, share)
        self._watched = replace(self._watched, history=(*self._watched.history, point))

    def _note_names(self, trainer: pl.Trainer) -> None:
        results = trainer._results
        metas = [metric.meta for metric in results.values()] if results is not None else []
        names = [f"{meta.name} ({meta.fx})" for meta in metas if not meta.name.startswith("privacy/")]
        self._watched = replace(self._watched, training_metrics=_joined(self._watched.training_metrics, names))


def _validation_metrics(trainer: pl.Trainer) -> dict[str, float | None]:
    """What this validation logged; ``trainer.callback_metrics`` would have the training metrics among it."""
    results = trainer._results
    logged = results.metrics(on_step=False)["callback"] if results is not None else {}
    values = {name: float(value) for name, value in logged.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _own_hooks(module: pl.LightningModule) -> list[str]:
    """The hooks that a module has of its own and that run while it is trained."""
    names = {name for kind in (ModelHooks, DataHooks) for name in vars(kind) if name.startswith("on_")}
    around = [name for name in names if not any(part in name for part in ("validation", "test", "predict"))]
    return [f"{type(module).__name__}.{name}" for name in sorted(around) if is_overridden(name, module)]


def _foreign_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that are neither Lightning's nor ours."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = ("lightning.", "lightning_dp.")
    return [callback for callback in callbacks if not type(callback).__module__.startswith(known)]


def _joined(before: tuple[str, ...], now: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*before, *now)))
