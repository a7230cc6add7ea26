"""Runs of a configuration: the user's own model, data and settings, from the arguments of ``lightning-dp fit``.

Owns: how a run's hyper-parameters, settings and strategy come into them. Does not own: a search (``searching``,
``random_search``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_dp.lightning_cli import DPLightningCLI
from lightning_dp.strategies import DPStrategy
from lightning_dp.tuning.fits import QUIET, Run, as_list, check_strategy, fit_and_score
from lightning_dp.tuning.scores import Scores


class ConfiguredRuns:
    """The runs of a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        scores: Score the runs.
        names: The arguments that are hyper-parameters, such as ``model.lr``, where these have other names.
    """

    def __init__(self, arguments: tuple[str, ...], scores: Scores, names: Mapping[str, str] | None = None) -> None:
        # Before the user's own, which may have them otherwise.
        self._arguments = (*(f"--trainer.{name}=false" for name in QUIET), *arguments)
        self._scores, self._names = scores, dict(names or {})

    def strategy(self) -> DPStrategy:
        """Return the strategy of the configuration.

        Raises:
            PrivacyConfigurationError: If it is not one for a search.
        """
        return check_strategy(_TunedCLI(self._arguments, None, None).trainer.strategy)

    def __call__(self, run: Run, strategy: DPStrategy) -> float:
        """Make a run, and return its score."""
        values = (f"--{self._names.get(name, name)}={value!r}" for name, value in run.values.items())
        cli = _TunedCLI((*self._arguments, *values), strategy, run)
        return fit_and_score(cli.trainer, cli.model, self._scores, run, {"datamodule": cli.datamodule})


class _TunedCLI(DPLightningCLI):
    """Lightning's command line, whose trainer is made for a run of a search and not used yet."""

    def __init__(self, arguments: tuple[str, ...], strategy: DPStrategy | None, run: Run | None) -> None:
        self._strategy, self._run = strategy, run
        with warnings.catch_warnings():
            # Of a process with arguments of its own; they are these.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(args=["fit", *arguments], save_config_callback=None)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        if self._run is None:
            return super()._instantiate_trainer(config, callbacks)
        given = [*as_list(config.get("callbacks")), *callbacks]
        own = {**self._run.settings, "strategy": self._strategy, "callbacks": None}
        return super()._instantiate_trainer({**config, **own}, self._run.callbacks(given))

    def _run_subcommand(self, subcommand: str) -> None:
        """Only make everything: who asked for it runs it."""
