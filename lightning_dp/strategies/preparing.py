"""What must be known of a model before its first release: who is private, and where the samples lie.

Owns: the order of the looking, and what follows from it. Does not own: any single look (``observing``, ``trials``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dp.bookkeeping import BookKeeping, Keeping, LoopKeeping
from lightning_dp.bookkeeping.sharded import ShardedKeeping
from lightning_dp.data import PoissonLoader
from lightning_dp.strategies import checks
from lightning_dp.strategies.between import check_model
from lightning_dp.strategies.manual import ManualStepping
from lightning_dp.strategies.observing import Observer
from lightning_dp.strategies.record import training_record
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import AutomaticStepping, Stepping
from lightning_dp.strategies.tree import Tree, same
from lightning_dp.strategies.trials import AutomaticTrial, ManualTrial

Parameters = dict[str, nn.Parameter]


@dataclass(eq=False)
class Prepared:
    """A model that was looked at.

    Args:
        keeping: Finds its per-sample gradients.
        stepping: Releases them.
        public: The optimizers whose gradients do not depend on the training data.
        trained: The parameters that are trained privately, by name.
        tree: The user's module.
        draws_elsewhere: Whether its training step draws random numbers by Python or NumPy.
    """

    keeping: Keeping
    stepping: Stepping
    public: Set[Optimizer]
    trained: Parameters
    tree: Tree
    draws_elsewhere: bool
    _facts: list[Any] = field(default_factory=list)

    def holds_for(self, module: pl.LightningModule) -> bool:
        """Whether the same parameters are still to be trained; then none has a gradient of the step before.

        Raises:
            PrivacyError: If something has appeared since that cannot be trained privately.
        """
        self.tree.look()
        facts = checks.facts(self.tree, module.trainer.optimizers)
        if not same(facts, self._facts):
            if not self.keeping.trains(_checked_parameters(module, self.public)[0]):
                return False
            self._facts = facts
        _forget_gradients(module, self.trained)
        return True


@dataclass(frozen=True)
class Found:
    """What a training step trains, and by what it is looked at.

    Args:
        trial: Runs it.
        observer: Looks at it.
        trained: The parameters that are trained privately, by name.
        others: Further parameters that require a gradient.
        steps: The optimizers in the order of their steps in one training step; known under manual optimization only.
        public: Those whose gradients do not depend on the training data.
    """

    trial: AutomaticTrial | ManualTrial
    observer: Observer
    trained: Parameters
    others: Parameters
    steps: Sequence[Optimizer] = ()
    public: Set[Optimizer] = frozenset()


def prepare(
    module: pl.LightningModule,
    run: PrivateRun,
    run_step: Callable[..., Any],
    put: Callable[[Stepping], Stepping],
) -> Prepared:
    """Look at a model's training step.

    Args:
        module: The user's module.
        run: Gives the samples, the settings, the mechanism and the budget.
        run_step: Transfers a batch and runs the training step on it, with another ``batch_idx`` if that is given.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.

    Raises:
        PrivacyError: If it cannot be trained privately.
    """
    found = find(module, run, run_step, put)
    run.processes.check_alike({"what is trained": list(found.trained)})
    keeping = _keeping_of(module, run, found)
    found.observer.observe(keeping, found.trained, check=run.settings.self_check)
    if run.settings.self_check:
        check_model(run.processes, found.observer, keeping)
    run.training = training_record(module, run, found, keeping)
    if isinstance(keeping, BookKeeping) and isinstance(found.trial, ManualTrial):
        return _prepare_manual(module, run, keeping, found, found.trial)
    stepping = AutomaticStepping(keeping, run.private_step(found.trained), run.book)
    return Prepared(keeping, stepping, frozenset(), found.trained, Tree(module), found.observer.draws_elsewhere)


def _keeping_of(module: pl.LightningModule, run: PrivateRun, found: Found) -> Keeping:
    if run.settings.clipping_engine == "loop" and module.automatic_optimization:
        return LoopKeeping(found.trained, found.others)
    if any(isinstance(p, DTensor) for p in found.trained.values()):
        return ShardedKeeping(found.trained, found.others, module)
    return BookKeeping(found.trained, found.others)


def look_again(
    module: pl.LightningModule,
    run: PrivateRun,
    run_step: Callable[..., Any],
    put: Callable[[Stepping], Stepping],
    keeping: BookKeeping,
) -> None:
    """Look at a training step once more, for functions that no earlier step ran.

    Args:
        module: The user's module.
        run: Gives the samples and the settings.
        run_step: Transfers a batch and runs the training step on it.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.
        keeping: Is to know these functions, too.

    Raises:
        PrivacyError: If the training step, as it is now, cannot be trained privately.
    """
    found = find(module, run, run_step, put)
    again = BookKeeping(found.trained, found.others)
    found.observer.observe(again, found.trained, check=run.settings.self_check)
    keeping.learn_from(again)


def find(
    module: pl.LightningModule,
    run: PrivateRun,
    run_step: Callable[[Any], Any],
    put: Callable[[Stepping], Stepping],
    examples: PoissonLoader | None = None,
) -> Found:
    """Find out what a training step trains; arguments as for `prepare`.

    Args:
        module: The user's module.
        run: Gives the samples, unless ``examples`` does.
        run_step: The training step.
        put: Puts a `Stepping` behind the hooks of the strategy.
        examples: Gives other samples than those of the training data.

    Raises:
        PrivacyError: If that cannot be trained privately.
    """
    mean_loss = run.settings.loss_reduction == "mean"
    loader = run.loader if examples is None else examples  # an empty loader is false
    assert loader is not None, "settled with the dataloader"
    run.settings.resolved_clipping().check_names(name for name, _ in module.named_parameters())
    if module.automatic_optimization:
        trial = AutomaticTrial(module, run_step)
        trained, others = _checked_parameters(module)
        return Found(trial, Observer(module, loader, trial, mean_loss=mean_loss), trained, others)
    manual = ManualTrial(module, run_step, put)
    observer = Observer(module, loader, manual, mean_loss=mean_loss)
    steps, public = observer.rehearse(manual)
    trained, others = _checked_parameters(module, public)
    manual.groups = checks.named_groups(module, [o for o in module.trainer.optimizers if o not in public])
    return Found(manual, observer, trained, others, steps, public)


def _prepare_manual(
    module: pl.LightningModule, run: PrivateRun, keeping: BookKeeping, found: Found, trial: ManualTrial
) -> Prepared:
    releases = max(1, sum(optimizer not in found.public for optimizer in found.steps))
    world_size = module.trainer.world_size
    run.settle(module.trainer, world_size, releases_per_draw=releases, steps_per_draw=trial.fewest_steps)
    _announce(module.trainer.optimizers, found.public)
    public = checks.named_groups(module, found.public)
    stepping = ManualStepping(keeping, run.private_step(found.trained), run.book, trial.groups, releases, public)
    return Prepared(keeping, stepping, found.public, found.trained, Tree(module), found.observer.draws_elsewhere)


def _checked_parameters(
    module: pl.LightningModule, public: Set[Optimizer] = frozenset()
) -> tuple[Parameters, Parameters]:
    """Return the trained parameters and the others that require a gradient, after all checks of the module."""
    checks.check_module(module, public)
    private = [optimizer for optimizer in module.trainer.optimizers if optimizer not in public]
    trained, others = checks.trained_parameters(module, private, public)
    checks.check_hooks(trained)
    _forget_gradients(module, trained)
    return trained, others


def _forget_gradients(module: pl.LightningModule, trained: Parameters) -> None:
    if module.automatic_optimization:
        for parameter in trained.values():
            parameter.grad = None  # of the step before: not an escape from the book


def _announce(optimizers: list[Optimizer], public: Set[Optimizer]) -> None:
    for k, optimizer in enumerate(optimizers):
        if optimizer in public:
            count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            rank_zero_info(
                f"Privacy: the gradients of optimizer {k} ({type(optimizer).__name__}, {count:,} parameters) do not "
                "depend on the training data, as far as observed: it steps without noise."
            )
