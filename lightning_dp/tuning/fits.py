"""One run of a search: a fit on full batches, and its score.

Owns: what a fit must keep to, so that it spends its share and its score means its setting. Does not own: the trainer
and the model (``tune``, ``configured``) or which runs are made (``trials``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_dp.accounting import PRVAccountant
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.trials import Trial

QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
"""What the trainers of a search leave out, unless the user says otherwise."""

Fit = Callable[[Trial, DPStrategy], float]
"""Makes a run by a strategy, and returns its score."""


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
        if not pl_module.automatic_optimization:
            raise PrivacyConfigurationError(
                f"automatic_optimization=False of {type(pl_module).__name__} in a search: expected one release in each "
                "step, of one optimizer. Use automatic optimization."
            )


def trainer_settings(trial: Trial) -> dict[str, Any]:
    """Return the arguments of a trainer that follow from a run: its steps, and no validation on the way."""
    steps = trial.setting.num_steps
    return {"max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": steps + 1, "num_sanity_val_steps": 0}


def fit_and_score(trainer: pl.Trainer, module: pl.LightningModule, monitor: str, trial: Trial, data: Any) -> float:
    """Make a run.

    Args:
        trainer: With `trainer_settings` and `FullBatches`.
        module: Not trained yet.
        monitor: Name of the validation metric.
        trial: Which run.
        data: Keyword arguments of ``fit``.

    Returns:
        The score; not a number if the metric is none.

    Raises:
        PrivacyError: If the fit ended before its last step.
    """
    validation = {name: value for name, value in data.items() if name != "train_dataloaders"}
    validation = {"dataloaders" if name == "val_dataloaders" else name: v for name, v in validation.items()}
    _score(trainer, module, monitor, validation)  # whatever is wrong with it is found before anything is spent
    before = trainer.strategy.num_releases  # type: ignore[attr-defined]
    trainer.fit(module, **data)
    made = trainer.strategy.num_releases - before  # type: ignore[attr-defined]
    if made != trial.setting.num_steps:
        raise PrivacyError(
            f"a run of the search ended after {made} of {trial.setting.num_steps} steps, and its score would be that "
            "of another setting. What it spent stays spent. Leave out what ends a fit early, such as EarlyStopping and "
            "max_time."
        )
    return _score(trainer, module, monitor, validation)


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
            f"accountant={settings.accountant!r} of a search: expected 'prv', which is exact for full batches; the "
            "shares of the runs are divided by the same formula."
        )
    return strategy


def _score(trainer: pl.Trainer, module: pl.LightningModule, monitor: str, data: Mapping[str, Any]) -> float:
    trainer.validate(module, verbose=False, **data)
    metrics = trainer.callback_metrics
    if monitor not in metrics:
        raise PrivacyConfigurationError(
            f"monitor={monitor!r}: validation logs {sorted(metrics) or 'nothing'}. Give the name of what is to choose, "
            "and log it in validation_step."
        )
    return float(metrics[monitor])
