"""How many logical batches a trainer is set to run.

Owns: the reading of the trainer's limits. Lightning's own ``estimated_stepping_batches`` cannot be asked here: it asks
for the dataloader that is being made.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl


def planned_steps(trainer: pl.Trainer, batches_per_epoch: int, steps_per_batch: int = 1) -> int | None:
    """Return the number of logical batches from the first to the last, or ``None`` if there is no limit.

    Args:
        trainer: Gives ``max_steps``, ``max_epochs`` and ``limit_train_batches``.
        batches_per_epoch: The length of the train dataloader.
        steps_per_batch: Optimizer steps in one training step, each of which counts towards ``max_steps``.
    """
    limit = trainer.limit_train_batches
    per_epoch = int(batches_per_epoch * limit) if isinstance(limit, float) else min(batches_per_epoch, limit or 0)
    limits = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        limits.append(math.ceil(trainer.max_steps / steps_per_batch))
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * per_epoch)
    return max(1, min(limits)) if limits else None


def next_step(trainer: pl.Trainer) -> int:
    """Return the number of the logical batch that comes next, from 0 on.

    Under manual optimization ``global_step`` counts the steps of all optimizers, of which a batch may have any number.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    processed: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return processed
