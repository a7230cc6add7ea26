"""Whether public gradients see what private steps leave behind, looked at before the first step that has both.

Owns: the comparison and its refusal. Does not own: the steps (``public_steps``), or the samples (``observing``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.preparing import find
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import Stepping
from lightning_dp.strategies.trials import AutomaticTrial
from lightning_dp.strategies.undisturbed import drawing_alike


def check_apart(
    module: pl.LightningModule,
    run: PrivateRun,
    run_step: Callable[[Any], Any],
    put: Callable[[Stepping], Stepping],
    public: Any,
) -> None:
    """Compare the gradient of a public batch after training steps on several private examples.

    A step that goes on by itself, as by a counter that the check cannot put back, tells nothing.

    Args:
        module: The user's module.
        run: Gives the private examples and the settings.
        run_step: Transfers a batch and runs the training step on it.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.
        public: The public batch, not transferred yet.

    Raises:
        UnsupportedModelError: If they differ: public gradients have no noise.
    """
    with drawing_alike(run.processes):
        found, trial = find(module, run, run_step, put), AutomaticTrial(module, run_step)
        first, again, *others = found.observer.after_each(lambda: trial.gradients(found.trained, public)[0])
    if not _close(first, again):
        return
    if not all(_close(first, other) for other in others):
        raise UnsupportedModelError(
            "the gradient of a public batch changed with the private example that a training step had seen before: "
            "the module keeps something of a batch, in a buffer or an attribute, and public gradients have no noise. "
            "Let training_step keep nothing of its batch, or use PublicPretraining(mix='switch'), whose public steps "
            "all come first."
        )


def _close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(g, other[name], rtol=1e-4, atol=1e-6, equal_nan=True) for name, g in one.items())
