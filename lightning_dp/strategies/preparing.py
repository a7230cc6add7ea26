"""What must be known of a model before its first release: who is private, and where the samples lie.

Owns: the order of the looking, and what follows from it. Does not own: any single look (``observing``, ``trials``).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_dp.bookkeeping import BookKeeping, Keeping, LoopKeeping
from lightning_dp.strategies import checks
from lightning_dp.strategies.manual import ManualStepping
from lightning_dp.strategies.observing import Observer
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import AutomaticStepping, Stepping
from lightning_dp.strategies.trials import AutomaticTrial, ManualTrial

Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Prepared:
    """A model that was looked at.

    Args:
        keeping: Finds its per-sample gradients.
        stepping: Releases them.
        public: The optimizers whose gradients do not depend on the training data.
    """

    keeping: Keeping
    stepping: Stepping
    public: Set[Optimizer]

    def holds_for(self, module: pl.LightningModule) -> bool:
        """Whether the same parameters are still to be trained.

        Raises:
            PrivacyError: If something has appeared since that cannot be trained privately.
        """
        trained, _ = _checked_parameters(module, self.public)
        return self.keeping.trains(trained)


def prepare(
    module: pl.LightningModule,
    run: PrivateRun,
    run_step: Callable[[Any], Any],
    put: Callable[[Stepping], Stepping],
) -> Prepared:
    """Look at a model's training step.

    Args:
        module: The user's module.
        run: Gives the samples, the settings, the mechanism and the budget.
        run_step: Transfers a batch and runs the training step on it.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.

    Raises:
        PrivacyError: If it cannot be trained privately.
    """
    if module.automatic_optimization:
        return _prepare_automatic(module, run, AutomaticTrial(module, run_step))
    return _prepare_manual(module, run, ManualTrial(module, run_step, put))


def _prepare_automatic(module: pl.LightningModule, run: PrivateRun, trial: AutomaticTrial) -> Prepared:
    trained, others = _checked_parameters(module)
    keeping = (LoopKeeping if run.settings.clipping_engine == "loop" else BookKeeping)(trained, others)
    _observer(module, run, trial).observe(keeping, trained, check=run.settings.self_check)
    return Prepared(keeping, AutomaticStepping(keeping, run.private_step(trained), run.budget), frozenset())


def _prepare_manual(module: pl.LightningModule, run: PrivateRun, trial: ManualTrial) -> Prepared:
    observer, optimizers = _observer(module, run, trial), module.trainer.optimizers
    steps, public = observer.rehearse(trial)
    trained, others = _checked_parameters(module, public)
    keeping = BookKeeping(trained, others)
    trial.groups = checks.named_groups(module, [o for o in optimizers if o not in public])
    observer.observe(keeping, trained, check=run.settings.self_check)
    releases = max(1, sum(optimizer not in public for optimizer in steps))
    run.settle(module.trainer, module.trainer.world_size, releases_per_draw=releases, steps_per_draw=len(steps))
    _announce(optimizers, public)
    stepping = ManualStepping(keeping, run.private_step(trained), run.budget, trial.groups, releases)
    return Prepared(keeping, stepping, public)


def _observer(module: pl.LightningModule, run: PrivateRun, trial: AutomaticTrial | ManualTrial) -> Observer:
    assert run.loader is not None, "settled with the dataloader"
    return Observer(module, run.loader, trial, mean_loss=run.settings.loss_reduction == "mean")


def _checked_parameters(
    module: pl.LightningModule, public: Set[Optimizer] = frozenset()
) -> tuple[Parameters, Parameters]:
    """Return the trained parameters and the others that require a gradient, after all checks of the module."""
    checks.check_module(module, public)
    private = [optimizer for optimizer in module.trainer.optimizers if optimizer not in public]
    trained, others = checks.trained_parameters(module, private, public)
    checks.check_hooks(trained)
    if module.automatic_optimization:
        for parameter in trained.values():
            parameter.grad = None  # of the step before: not an escape from the book
    return trained, others


def _announce(optimizers: list[Optimizer], public: Set[Optimizer]) -> None:
    for k, optimizer in enumerate(optimizers):
        if optimizer in public:
            count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            rank_zero_info(
                f"Privacy: the gradients of optimizer {k} ({type(optimizer).__name__}, {count:,} parameters) do not "
                "depend on the training data, as far as observed: it steps without noise."
            )
