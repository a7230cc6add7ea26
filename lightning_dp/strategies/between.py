"""What processes that train together must have in common: the settings, the data, and the model.

Owns: comparing them before the first step. Does not own: the comparison of weights later on (``sums``), nor what
processes tell each other (``processes``).

Units go to processes by their place in a draw, so that without one of them those after it go to other processes. A
gradient must therefore depend neither on the process that finds it nor on the samples of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_dp.bookkeeping import Keeping
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.data import PoissonLoader, Units
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.processes import Processes
from lightning_dp.strategies.observing import Observer
from lightning_dp.strategies.planning import next_step, planned_steps
from lightning_dp.strategies.settings import PrivacySettings
from lightning_dp.strategies.undisturbed import drawing_alike

_COMPARED = 32
"""Units of the data."""

_TOLERANCE = 1e-2
"""Of a norm: equal samples on equal devices differ by rounding only."""

Norms = Sequence[Mapping[str, float]]


def check_settings(
    processes: Processes, settings: PrivacySettings, user: DataLoader[object], units: Units, trainer: pl.Trainer
) -> None:
    """Compare what processes are about to do, which would otherwise end in waiting.

    Args:
        processes: Of which this is one.
        settings: Its arguments.
        user: Its train dataloader.
        units: What the dataset is made of.
        trainer: Gives the number of steps.

    Raises:
        PrivacyConfigurationError: If they differ; in all of them.
    """
    processes.check_alike(
        {
            **settings.facts(),
            "the size of the training data": (len(user.dataset), units.num_units, units.unit),  # type: ignore[arg-type]
            "the rows of a unit": (units.examples_per_unit, units.views),
            "the partition of the training data": units.partition,
            "batch_size of the train dataloader": user.batch_size,
            "the length of the train dataloader": len(user),
            "the planned number of steps": (planned_steps(trainer, len(user)), next_step(trainer)),
            "the number of optimizers": len(trainer.strategy.optimizers),
            "automatic_optimization": trainer.lightning_module.automatic_optimization,
        }
    )


def check_data(processes: Processes, loader: PoissonLoader) -> None:
    """Compare some units of the training data, in their order.

    Raises:
        PrivacyConfigurationError: If they differ: two processes might have the same unit in one logical batch.
    """
    if processes.size == 1:
        return
    size = loader.units.num_units
    count = min(_COMPARED, size)
    with drawing_alike(processes):
        found = processes.together(lambda: [_digest(loader.batch_of([k * size // count])) for k in range(count)])
    name = "the training data or its order (say, by a random split without a seed)"
    processes.check_alike({name: hashlib.sha256(repr((loader.units.layout, found)).encode()).hexdigest()[:16]})


def check_model(processes: Processes, observer: Observer, keeping: Keeping) -> None:
    """Compare gradients of one sample between processes, and beside other samples in the other processes.

    A step that goes on by itself, as by a counter that the check cannot put back, tells nothing.

    Raises:
        UnsupportedModelError: If they differ.
    """
    if processes.size == 1:
        return
    state = RandomState.of_all()

    def norms(sample: str) -> Norms:
        state.restore()
        return observer.norms(keeping, sample)

    with drawing_alike(processes):
        state = RandomState.of_all()
        first, again = (processes.together(lambda: norms("a")) for _ in range(2))
        if not all(processes.gather(_close(first, again))):
            return
        if not all(_close(first, other) for other in processes.gather(first)):
            raise UnsupportedModelError(
                "the gradient of one sample is not the same in all processes: something of the module that is neither "
                "a parameter nor a buffer differs between them, such as an attribute that was drawn at random. Make "
                "it a buffer, or make it by a seed."
            )
        for turn in range(2 if observer.num_samples > 1 else 0):
            has_first = processes.rank % 2 == turn
            found = processes.together(lambda sample="a" if has_first else "b": norms(sample))  # type: ignore[misc]
            if not all(processes.gather(not has_first or _close(first, found))):
                raise UnsupportedModelError(
                    "the gradient of a sample changes with the samples of another process: the training step gathers "
                    "something of them, so that clipping cannot bound what one sample changes. Leave all_gather and "
                    "other collectives out of the loss."
                )


def _close(one: Norms, other: Norms) -> bool:
    """Whether norms agree, measured by the largest one."""
    if [part.keys() for part in one] != [part.keys() for part in other]:
        return False
    most = max((norm for part in one for norm in part.values()), default=0.0)
    pairs = ((a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)
    return all(abs(a - b) <= _TOLERANCE * most for a, b in pairs)


def _digest(batch: Any) -> str:
    """Return what tells a batch from another, by its tensors, arrays and plain values."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray | str | int | float | bytes):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
