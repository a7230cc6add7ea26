"""The private strategy of a trainer, for the callbacks that need one."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.strategies import DPStrategy


def private_strategy(trainer: pl.Trainer, callback: pl.Callback) -> DPStrategy:
    """Return the trainer's private strategy.

    Raises:
        PrivacyConfigurationError: If it has another one.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DPStrategy):
        raise PrivacyConfigurationError(
            f"{type(callback).__name__} with strategy={type(strategy).__name__}: expected a private strategy. Use "
            "Trainer(strategy=DPStrategy(...)), or leave the callback out."
        )
    return strategy
