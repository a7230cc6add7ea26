"""Fits of a configuration: the user's own model, data and settings, from the very arguments of ``lightning-dp fit``.

Owns: how they become a fit that can be measured. Does not own: what is changed of the trainer for it (``fits``).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_dp.benchmarking.baton import Baton
from lightning_dp.benchmarking.fits import Variant
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.lightning_cli import DPLightningCLI
from lightning_dp.strategies import DPStrategy


@dataclass(frozen=True)
class ConfiguredFit:
    """A fit of a configuration, in one of its variants.

    Args:
        arguments: Those of ``lightning-dp fit``.
        variant: How it is trained.
    """

    arguments: tuple[str, ...]
    variant: Variant

    def __call__(self, baton: Baton) -> None:
        """Build model, data and trainer, and fit; weights and releases are thrown away.

        Raises:
            PrivacyConfigurationError: If the configuration's strategy is not private.
        """
        with tempfile.TemporaryDirectory() as folder:
            _MeasuredCLI(self.arguments, self.variant, folder, baton)


class _MeasuredCLI(DPLightningCLI):
    """Lightning's command line with a fit that waits for its turns; no checkpoint is resumed or saved."""

    def __init__(self, arguments: tuple[str, ...], variant: Variant, folder: str, baton: Baton) -> None:
        self._variant, self._folder, self._baton = variant, folder, baton
        super().__init__(args=["fit", *arguments], save_config_callback=None)

    def before_instantiate_classes(self) -> None:
        """What the arguments name is imported by now."""
        super().before_instantiate_classes()
        self._baton.imports_done()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        strategy, given = config.get("strategy"), config.get("callbacks") or []
        if not isinstance(strategy, DPStrategy):
            shown = strategy if isinstance(strategy, str) else type(strategy).__name__
            raise PrivacyConfigurationError(
                f"a benchmark with trainer.strategy={shown}: expected a private strategy, which is measured against "
                "ordinary training. Use lightning_dp.DPStrategy, or leave the strategy out."
            )
        given = given if isinstance(given, list) else [given]
        settings = {**config, "callbacks": [*given, *callbacks]}
        return self._variant.trainer(self.trainer_class, settings, self._folder, self._baton)

    def _run_subcommand(self, subcommand: str) -> None:
        self.trainer.fit(self.model, datamodule=self.datamodule)
