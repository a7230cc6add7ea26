"""Runs of a configuration: the user's own model, data and settings, from the arguments of ``lightning-dp fit``.

Owns: how a run's learning rate, steps and strategy come into them. Does not own: the search (``searching``).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.lightning_cli import DPLightningCLI
from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.fits import QUIET, FullBatches, check_strategy, fit_and_score, trainer_settings
from lightning_dp.tuning.searching import FINAL
from lightning_dp.tuning.trials import Trial


class ConfiguredRuns:
    """The runs of a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        learning_rate: The argument that is the learning rate, such as ``model.lr``.
        monitor: Name of the validation metric.
        directory: Where the final run's weights go.
    """

    def __init__(self, arguments: tuple[str, ...], learning_rate: str, monitor: str, directory: Path) -> None:
        # Before the user's own, which may have them otherwise.
        self._arguments = (*(f"--trainer.{name}=false" for name in QUIET), *arguments)
        self._learning_rate, self._monitor, self._directory = learning_rate, monitor, directory

    def strategy(self) -> DPStrategy:
        """Return the strategy of the configuration.

        Raises:
            PrivacyConfigurationError: If it is not one for a search.
        """
        return check_strategy(_TunedCLI(self._arguments, None, {}).trainer.strategy)

    def __call__(self, trial: Trial, strategy: DPStrategy) -> float:
        """Make a run, and return its score."""
        arguments = (*self._arguments, f"--{self._learning_rate}={trial.setting.lr!r}")
        cli = _TunedCLI(arguments, strategy, trainer_settings(trial))
        data: dict[str, Any] = {"datamodule": cli.datamodule}
        score = fit_and_score(cli.trainer, cli.model, self._monitor, trial, data)
        if trial.is_final:
            cli.trainer.save_checkpoint(self._directory / FINAL)
        return score


class _TunedCLI(DPLightningCLI):
    """Lightning's command line, whose trainer is made for a run of a search and not used yet."""

    def __init__(self, arguments: tuple[str, ...], strategy: DPStrategy | None, settings: dict[str, Any]) -> None:
        self._shared, self._settings = strategy, settings
        with warnings.catch_warnings():
            # Of a process with arguments of its own; they are these.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(args=["fit", *arguments], save_config_callback=None)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        own = {"strategy": self._shared} if self._shared is not None else {}
        return super()._instantiate_trainer({**config, **self._settings, **own}, [*callbacks, FullBatches()])

    def _run_subcommand(self, subcommand: str) -> None:
        """Only make everything: who asked for it runs it."""
