"""`tune`: a private search from Python.

Owns: its arguments, and the trainers of its runs. Does not own: the search (``searching``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.fits import QUIET, FullBatches, fit_and_score, trainer_settings
from lightning_dp.tuning.scaling import SearchSpace
from lightning_dp.tuning.searching import FINAL, TuningResult, run_search, search_for
from lightning_dp.tuning.trials import Trial


def tune(
    make_module: Callable[[float], pl.LightningModule],
    train_dataloader: object,
    val_dataloader: object,
    *,
    strategy: DPStrategy,
    selection: str,
    monitor: str = "val_accuracy",
    mode: str = "max",
    space: SearchSpace | None = None,
    small_epsilons: tuple[float, ...] | None = None,
    num_runs: tuple[int, ...] = (3, 3),
    seed: int = 0,
    directory: str | os.PathLike[str] = "tuning",
    trainer: Mapping[str, Any] | None = None,
) -> TuningResult:
    """Find learning rate and steps by linear scaling, and train with them, all within one budget (arXiv 2212.04486).

    A few runs at small epsilons try random settings; the best product of learning rate and steps at each of them gives
    a line, and the line the setting of the final run, which has the rest of the budget. Full batches only.

    Guarantee: all runs together, interrupted ones included, spend at most ``target_epsilon`` of the strategy, and that
    covers the choice. Not covered: the validation data.

    Args:
        make_module: Makes a module that is not trained yet, of a learning rate.
        train_dataloader: A `DataLoader` with ``batch_size=len(dataset)``, such as ``FrozenFeatures(...).dataloader()``.
        val_dataloader: Public data that the best run is chosen by.
        strategy: A new one, with ``target_epsilon`` and ``target_delta`` for all runs together.
        selection: ``"public"``: says that the validation data is.
        monitor: What ``validation_step`` logs and is to choose.
        mode: ``"max"`` or ``"min"``.
        space: Where settings are tried.
        small_epsilons: What one run of each stage before the final one has, rising, in nats. Default: 5 % and 10 % of
            the target.
        num_runs: How many runs each of these stages has.
        seed: Of the settings that are tried. It says nothing about noise and sampling, which are always secret.
        directory: Of this search alone; a search that was interrupted goes on there, and what it has spent counts.
        trainer: Further arguments of every ``Trainer``.

    Raises:
        PrivacyConfigurationError: If the arguments do not go together, or the directory belongs to another search.
        PrivacyBudgetExceeded: If interrupted runs have left too little for the final one.

    Example:
        >>> result = tune(  # doctest: +SKIP
        ...     lambda lr: LinearHead(768, 10, lr=lr), train.dataloader(), public.dataloader(), selection="public",
        ...     strategy=DPStrategy(target_epsilon=1.0, target_delta=1e-5),
        ... )
        >>> result.print()  # doctest: +SKIP
    """
    search = search_for(
        strategy,
        selection=selection,
        small_epsilons=small_epsilons,
        num_runs=num_runs,
        space=space or SearchSpace(),
        monitor=monitor,
        mode=mode,
        seed=seed,
    )
    given = dict(trainer or {})
    callbacks = given.pop("callbacks", None) or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]

    def fit(trial: Trial, shared: DPStrategy) -> float:
        arguments = {
            **dict.fromkeys(QUIET, False),
            **given,
            **trainer_settings(trial),
            "callbacks": [*callbacks, FullBatches()],
        }
        one = pl.Trainer(**arguments, strategy=shared)
        module = make_module(trial.setting.lr)
        data = {"train_dataloaders": train_dataloader, "val_dataloaders": val_dataloader}
        score = fit_and_score(one, module, monitor, trial, data)
        if trial.is_final:
            one.save_checkpoint(Path(directory) / FINAL)
        return score

    return run_search(search, strategy, Path(directory), fit)
