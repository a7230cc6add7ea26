"""One run of a search: a fit, and its score.

Owns: what a fit must keep to, so that it spends what it may and its score means its setting; fits from Python. Does not
own: fits of a configuration (``configured``) or which runs are made (``trials``, ``candidates``).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from lightning_dp.accounting import PRVAccountant
from lightning_dp.callbacks import PrivacyReport
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.strategies import DPStrategy
from lightning_dp.strategies.checks import check_alone
from lightning_dp.tuning.scores import Scores

QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
"""What the trainers of a search leave out, unless the user says otherwise."""


@dataclass(frozen=True)
class Run:
    """A fit of a search.

    Args:
        values: The hyper-parameters that are searched for, by name.
        settings: Arguments of the trainer that follow from the search.
        check: Refuses, before the first step, a fit that is not what is accounted for.
        checkpoint: Where its weights go; ``None`` if nobody needs them.
        is_secret: Whether nothing of it may be left behind but these weights, nor come into the next run.
    """

    values: Mapping[str, float]
    settings: Mapping[str, Any]
    check: pl.Callback
    checkpoint: Path | None = None
    is_secret: bool = False

    def callbacks(self, given: Sequence[pl.Callback]) -> list[pl.Callback]:
        """Return those of its trainer: the user's, and the check."""
        kept = copy.deepcopy([one for one in given if not isinstance(one, PrivacyReport)]) if self.is_secret else given
        return [*kept, self.check]


Fit = Callable[[Run, DPStrategy], float]
"""Makes a run by a strategy, and returns its score."""


class PythonRuns:
    """Runs of modules and dataloaders, as Python has them.

    Args:
        make_module: Makes a module that is not trained yet, of the hyper-parameters.
        train_dataloader: Private.
        val_dataloader: Chooses.
        scores: Score the runs.
        trainer: Further arguments of every ``Trainer``.
    """

    def __init__(
        self,
        make_module: Callable[[Mapping[str, float]], pl.LightningModule],
        train_dataloader: object,
        val_dataloader: object,
        scores: Scores,
        trainer: Mapping[str, Any] | None,
    ) -> None:
        self._make_module, self._scores = make_module, scores
        self._data = {"train_dataloaders": train_dataloader, "val_dataloaders": val_dataloader}
        self._trainer = dict(trainer or {})
        self._callbacks = as_list(self._trainer.pop("callbacks", None))
        self._before: weakref.ref[pl.LightningModule] | None = None

    def __call__(self, run: Run, strategy: DPStrategy) -> float:
        """Make a run, and return its score."""
        arguments = {**dict.fromkeys(QUIET, False), **self._trainer, **run.settings}
        trainer = pl.Trainer(**arguments, callbacks=run.callbacks(self._callbacks), strategy=strategy)
        return fit_and_score(trainer, self._new_module(run.values), self._scores, run, self._data)

    def _new_module(self, values: Mapping[str, float]) -> pl.LightningModule:
        module = self._make_module(values)
        if self._before is not None and self._before() is module:
            raise PrivacyConfigurationError(
                f"make_module returned the {type(module).__name__} of the run before: expected a new one in every run, "
                "which is not trained yet."
            )
        self._before = weakref.ref(module)
        return module


def as_list(callbacks: Any) -> list[pl.Callback]:
    """Return a trainer's callbacks, given as a list, alone or not at all."""
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


class FullBatches(pl.Callback):
    """Refuses, before the first step, a fit that is not on full batches, or has other releases than its steps."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check."""
        rate = trainer.strategy.sample_rate  # type: ignore[attr-defined]
        if not math.isclose(rate, 1.0, rel_tol=1e-9):
            raise PrivacyConfigurationError(
                f"the train dataloader of a search has sample_rate={rate:.6g}: expected 1, since all runs are on full "
                "batches. Give the DataLoader batch_size=len(dataset), as FrozenFeatures.dataloader() does; the memory "
                "of a step is bounded by max_physical_batch_size."
            )
        check_automatic(pl_module)


def check_automatic(module: pl.LightningModule) -> None:
    """Raise if the number of releases does not follow from the number of steps."""
    if not module.automatic_optimization:
        raise PrivacyConfigurationError(
            f"automatic_optimization=False of {type(module).__name__} in a search: expected one release in each "
            "step, of one optimizer. Use automatic optimization."
        )


def fit_and_score(trainer: pl.Trainer, module: pl.LightningModule, scores: Scores, run: Run, data: Any) -> float:
    """Make a run.

    Args:
        trainer: With the settings and the check of the run.
        module: Not trained yet.
        scores: Score the runs.
        run: Which run.
        data: Keyword arguments of ``fit``.

    Returns:
        The score; not a number if the metric is none.

    Raises:
        PrivacyConfigurationError: If there are several processes, or no such metric.
        PrivacyError: If the fit ended before its last step.
    """
    check_alone(trainer, "a search")
    validation = {name: value for name, value in data.items() if name != "train_dataloaders"}
    validation = {"dataloaders" if name == "val_dataloaders" else name: v for name, v in validation.items()}
    scores.check(trainer, module, validation)
    strategy: Any = trainer.strategy
    scores.pay(strategy)
    before = strategy.num_releases
    with scores.unseen(trainer):
        trainer.fit(module, **data)
    made, planned = strategy.num_releases - before, strategy.budget.planned_steps
    if made != planned:
        raise PrivacyError(
            f"a run of the search ended after {made} of {planned} steps, and its score would be that of another "
            "setting. What it spent stays spent. Leave out what ends a fit early, such as EarlyStopping and max_time."
        )
    score = scores.score(trainer, module, validation)
    if run.checkpoint is not None:
        trainer.save_checkpoint(run.checkpoint)
    return score


def check_strategy(strategy: object) -> DPStrategy:
    """Return the strategy of a search.

    Raises:
        PrivacyConfigurationError: If it has not what the accounting of a search needs.
    """
    if not isinstance(strategy, DPStrategy):
        raise PrivacyConfigurationError(
            f"strategy={strategy!r} of a search: expected a DPStrategy with target_epsilon and target_delta."
        )
    if strategy.num_releases:
        raise PrivacyConfigurationError(
            f"the strategy of a search has made {strategy.num_releases} releases before: expected a new one."
        )
    settings = strategy._run.settings
    for name, expected in {"target_epsilon": "the budget of all runs", "target_delta": "below 1/N"}.items():
        if getattr(settings, name) is None:
            raise PrivacyConfigurationError(f"{name}=None of a search: expected a number, {expected}.")
    for name, value in {"noise_multiplier": settings.noise_multiplier, "schedule": settings.schedule or None}.items():
        if value is not None:
            raise PrivacyConfigurationError(
                f"{name}={value!r} of a search: expected none, since the noise of every run follows from its share of "
                "the budget. Leave it out."
            )
    if not isinstance(settings.resolved_accountant(), PRVAccountant):
        raise PrivacyConfigurationError(
            f"accountant={settings.accountant!r} of a search: expected 'prv', the default: a search accounts for its "
            "runs in a way of its own."
        )
    return strategy


def budget_of(strategy: DPStrategy) -> tuple[float, float]:
    """Return the target epsilon and the delta of a search.

    Args:
        strategy: A new one, with target and delta.

    Raises:
        PrivacyConfigurationError: If the strategy does not go with a search.
    """
    settings = check_strategy(strategy)._run.settings
    return cast(float, settings.target_epsilon), cast(float, settings.target_delta)
