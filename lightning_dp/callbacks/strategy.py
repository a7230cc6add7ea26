"""The private strategy of a trainer, for the callbacks that need one."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.strategies import PrivateStrategy

_REASONS = {
    "FSDPStrategy": " FSDP1 flattens parameters and reduces gradients in the backward pass: for a sharded model use "
    "fully_shard (FSDP2) in configure_model(), and DPFSDPStrategy.",
    "DeepSpeedStrategy": " DeepSpeed reduces gradients in its own backward pass, before a sample's could be clipped: "
    "for a sharded model use fully_shard in configure_model(), and DPFSDPStrategy.",
}


def private_strategy(trainer: pl.Trainer, callback: pl.Callback) -> PrivateStrategy:
    """Return the trainer's private strategy.

    Raises:
        PrivacyConfigurationError: If it has another one.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, PrivateStrategy):
        raise PrivacyConfigurationError(
            f"{type(callback).__name__} with strategy={type(strategy).__name__}: expected a private strategy. Use "
            "Trainer(strategy=DPStrategy(...)), or leave the callback out."
            f"{_REASONS.get(type(strategy).__name__, '')}"
        )
    return strategy
