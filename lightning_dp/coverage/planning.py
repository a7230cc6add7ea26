"""`plan`: a fit up to its first step, which is looked at instead of made.

Owns: what of a trainer must be kept still so that nothing is trained, released or written. Does not own: what is found
out meanwhile (``rehearsal``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.coverage.rehearsal import Rehearsal, count
from lightning_dp.coverage.report import Plan
from lightning_dp.coverage.table import print_plan
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.forecasting.figure import ForecastFigure
from lightning_dp.forecasting.improvement import check_ending, write_improvement
from lightning_dp.strategies import DPStrategy

_NO_STEP = (
    "the fit would end before its first step: max_steps, max_epochs or limit_train_batches is zero or reached already, "
    "or there is no training_step."
)


def plan(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    *args: Any,
    show: bool = True,
    plot: str | Path | None = None,
    improvement: bool | str = False,
    **kwargs: Any,
) -> Plan:
    """Show and return what ``trainer.fit`` with the same arguments would do to parameters and budget, without training.

    Everything up to the first step runs as in a fit: ``setup``, ``configure_model``, ``configure_optimizers``,
    ``on_fit_start`` and ``on_train_start`` of module and callbacks. What later hooks change is not seen. Then the model
    is observed and some physical batches are run, forward and backward, and the fit ends.

    Guarantee: no step is made, nothing is released, no budget is spent; parameters and buffers are as those hooks left
    them, random number generators as before; no logger, checkpoint or journal writes. The plan holds shapes, times and
    settings, and the words of errors; nothing else depends on the training data.

    Args:
        trainer: With a `DPStrategy`.
        model: The module.
        *args: As for ``trainer.fit``: a dataloader or a datamodule.
        show: Whether to print the plan.
        plot: A file that the budget is drawn into, such as ``plan.png``; it is not written if a fit is refused before
            its budget is known.
        improvement: Whether to estimate on public data what a step improves, for several batch sizes; or a file for
            that table, too, that ends in ``.json`` or ``.md``.
        **kwargs: As for ``trainer.fit``.

    Raises:
        PrivacyConfigurationError: If the trainer has another strategy, or a plot or an improvement cannot be had. What
            a fit would refuse is in the plan.

    Example:
        >>> plan(trainer, model, train_dataloader)  # doctest: +SKIP
    """
    found, strategy = Plan(type(model).__name__), trainer.strategy
    if not isinstance(strategy, DPStrategy):
        raise PrivacyConfigurationError(
            f"a plan with strategy={type(strategy).__name__}: expected a private strategy, Trainer(strategy="
            "DPStrategy(...)); of any other fit there is nothing to say here."
        )
    figure = None if plot is None else ForecastFigure(plot)
    file = check_ending(improvement) if isinstance(improvement, str) else None
    rehearsed: list[bool] = []
    not_improved: list[PrivacyError] = []

    def rehearse(*parts: Any) -> None:
        rehearsed.append(True)
        rehearsal = Rehearsal(found, trainer, model, *parts)
        rehearsal.run()
        if improvement and not found.is_refused:
            try:
                rehearsal.improve(strategy.public)
            except PrivacyError as error:
                not_improved.append(error)
        raise _TunerExitException  # ends a fit without any hook but teardown, as Lightning's own tuner does

    with _nothing_written(trainer), strategy.rehearsing(rehearse):
        try:
            trainer.fit(model, *args, **kwargs)
        except PrivacyError as error:
            found.errors.append(str(error))
    if not_improved:
        raise not_improved[0]
    if not rehearsed:
        count(found, model, [])
        found.errors = found.errors or [_NO_STEP]
    if not strategy.is_global_zero:  # of several processes one shows and writes
        return found
    if show:
        print_plan(found)
    if figure is not None and found.forecast is not None:
        figure.save(found.forecast)
    if file is not None and found.improvement is not None:
        write_improvement(found.improvement, file)
    return found


class _SetUpOnly(pl.Callback):
    """Sends away the callbacks that write or show something; on an error, all others too."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        kept = [c for c in _callbacks(trainer) if not isinstance(c, Checkpoint | ProgressBar | ModelSummary)]
        _callbacks(trainer)[:] = kept  # in place: the list is being walked

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _callbacks(trainer)[:] = [self]


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


@contextmanager
def _nothing_written(trainer: pl.Trainer) -> Iterator[None]:
    """Keep loggers, profiler and writing callbacks off a trainer, and give it and all generators back as they were."""
    state = RandomState.of_all()
    names = ("callbacks", "loggers", "profiler", "num_sanity_val_steps")
    before = {name: getattr(trainer, name) for name in names}
    still = (
        [_SetUpOnly(), *_callbacks(trainer)],
        [DummyLogger()] if trainer.loggers else [],
        PassThroughProfiler(),
        0,
    )
    for name, value in zip(names, still, strict=True):
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        state.restore()
