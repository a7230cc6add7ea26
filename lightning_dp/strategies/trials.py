"""Trials: a training step is run on a few samples to be looked at, and nothing comes of it.

Owns: what a step's losses, books and ordinary gradients are, under automatic and under manual optimization. Does not
own: the samples (``observing``), or what is looked for (``bookkeeping``).
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.bookkeeping import Book, BookKeeping, Keeping
from lightning_dp.bookkeeping.held import held
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.strategies.checks import loss_of
from lightning_dp.strategies.following import Following
from lightning_dp.strategies.manual import Groups, PendingGradients
from lightning_dp.strategies.stepping import Stepping

_SOUGHT = 16
"""The first batches of an epoch, in one of which every optimizer must step."""

Gradients = Mapping[str, Tensor]


class Step(NamedTuple):
    """What an optimizer stepped by: the gradients of its parameters by ``id``, and whether samples took part."""

    optimizer: Optimizer
    gradients: dict[int, Tensor]
    depends: bool


class Trial(ABC):
    """Runs a training step; no parameter changes and nothing is released.

    A *release* below is what one noisy gradient would be made of: one for each training step, under manual optimization
    one for each step of a private optimizer.
    """

    @abstractmethod
    def loss(self, batch: Any) -> Tensor | None:
        """Run the forward pass, and return what a backward pass would start from."""

    @abstractmethod
    def books(self, keeping: BookKeeping, batch: Any, num_samples: int) -> list[Book]:
        """Return the book of every release."""

    @abstractmethod
    def gradients(self, trained: Mapping[str, nn.Parameter], batch: Any) -> list[Gradients]:
        """Return the gradients of every release by ordinary autograd."""


class AutomaticTrial(Trial):
    """A training step that returns its loss.

    Args:
        module: The user's module.
        run_step: Transfers a batch and runs the training step on it.
    """

    def __init__(self, module: pl.LightningModule, run_step: Callable[[Any], Any]) -> None:
        self._module, self._run_step = module, run_step

    def loss(self, batch: Any) -> Tensor | None:
        """Return the loss, if there is one."""
        return loss_of(self._run_step(batch))

    def books(self, keeping: Keeping, batch: Any, num_samples: int) -> list[Book]:
        """Return the one book."""
        with keeping.recording(num_samples):
            loss = self._required_loss(batch)
        with keeping.recording():
            loss.backward()
        return [keeping.close()]

    def gradients(self, trained: Mapping[str, nn.Parameter], batch: Any) -> list[Gradients]:
        """Return the gradients of the loss."""
        with gradients_put_aside([*trained.values(), *self._module.parameters()]):
            self._required_loss(batch).backward()  # autograd.grad would run no reentrant checkpoint
            return [{n: torch.zeros_like(held(p)) if p.grad is None else held(p.grad) for n, p in trained.items()}]

    def _required_loss(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        if loss is None:
            raise UnsupportedModelError(
                "the training step returned no loss for the first samples, so the bound cannot be checked on it. "
                "Return a loss for every batch, or train without the check: DPStrategy(self_check=False)."
            )
        return loss


class ManualTrial(Trial):
    """A training step that runs backward passes and optimizers itself.

    Args:
        module: The user's module.
        run_step: Transfers a batch and runs the training step on it, with a ``batch_idx``.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.

    Attributes:
        groups: The private optimizers, once they are known.
        fewest_steps: The fewest steps of optimizers that were seen in a training step; 0 before any was.
    """

    def __init__(
        self, module: pl.LightningModule, run_step: Callable[..., Any], put: Callable[[Stepping], Stepping]
    ) -> None:
        self._module, self._run_step, self._put = module, run_step, put
        self._batch_idx = 0
        self.groups: Groups = {}
        self.fewest_steps = 0

    def loss(self, batch: Any) -> Tensor | None:
        """Return the sum of all losses that a backward pass was asked for."""
        stepping = _Traced()
        self._run(stepping, batch)
        return cast(Tensor, sum(stepping.losses)) if stepping.losses else None

    def books(self, keeping: BookKeeping, batch: Any, num_samples: int) -> list[Book]:
        """Return the book of every step of a private optimizer."""
        stepping = _Recorded(keeping, self.groups)
        with keeping.recording(num_samples):
            self._run(stepping, batch)
        keeping.abandon()
        return stepping.books

    def gradients(self, trained: Mapping[str, nn.Parameter], batch: Any) -> list[Gradients]:
        """Return the gradients at every step of a private optimizer."""
        steps = self.steps(batch)
        return [
            {name: step.gradients[id(p)] for name, p in self.groups[step.optimizer].items()}
            for step in steps
            if step.optimizer in self.groups
        ]

    def seek(self, batch: Any) -> None:
        """Look for a ``batch_idx`` at which every optimizer steps: some do so in every n-th training step only.

        It is the first of an epoch, not the present one: a fit may be resumed in the middle. The next training step
        tells whether there are others with fewer steps.
        """
        optimizers = set(self._module.trainer.optimizers)
        for found in range(_SOUGHT):
            self._batch_idx = found
            if {step.optimizer for step in self.steps(batch)} == optimizers:
                self._batch_idx = found + 1
                self.fewest_steps = max(1, len(self.steps(batch)))
                break
        self._batch_idx = found if self.fewest_steps else 0

    def steps(self, *batches: Any) -> list[Step]:
        """Return every optimizer's steps in training steps that follow each other."""
        following = Following()
        following.mark(batches)
        stepping = _Ordinary(following)
        with following:
            self._run(stepping, *batches)
        return stepping.steps

    def compared(self, runs: list[list[Step]]) -> tuple[list[Optimizer], set[Optimizer]]:
        """Find out which optimizers are public: no sample takes part in their gradients.

        What operators cannot tell, because a number was read out of a tensor, gradients tell: they must also be exactly
        the same whatever the samples are.

        Args:
            runs: The steps in two training steps on the same samples, so that what the first leaves behind is seen in
                the second; for several batches of equal size and of different samples.

        Returns:
            The optimizers in the order of their steps in one training step, and the public ones.

        Raises:
            PrivacyConfigurationError: If an optimizer makes no step.
            UnsupportedModelError: If the samples decide which optimizers step.
        """
        order, optimizers = [step.optimizer for step in runs[0]], self._module.trainer.optimizers
        if any([step.optimizer for step in run] != order for run in runs):
            raise UnsupportedModelError(
                "which optimizers step, and how often, depends on the samples of the batch: that would be released "
                "without noise. Decide it by what does not depend on the training data, such as batch_idx."
            )
        for k, optimizer in enumerate(optimizers):
            if optimizer not in order:
                raise PrivacyConfigurationError(
                    f"optimizer {k} ({type(optimizer).__name__}) made no step when the training step was observed "
                    "before the first batch, so it is not known whether its gradients depend on the training data. Let "
                    f"one training step with batch_idx below {_SOUGHT} step every optimizer of self.optimizers()."
                )
        depends = {step.optimizer for run in runs for step in run if step.depends}
        public = {o for o in optimizers if o not in depends and len(runs) > 1 and _all_equal(o, runs)}
        private = {id(p) for optimizer in optimizers if optimizer not in public for p in _parameters(optimizer)}
        shares = {optimizer for optimizer in public if any(id(p) in private for p in _parameters(optimizer))}
        none_is_private = len(public) == len(optimizers)
        return order[: math.ceil(len(order) / 2)], set() if none_is_private else public - shares

    def _run(self, stepping: Stepping, *batches: Any) -> None:
        with self._without_effect(stepping):
            for batch in batches:
                self._run_step(batch, self._batch_idx)

    @contextmanager
    def _without_effect(self, stepping: Stepping) -> Iterator[None]:
        """Put back afterwards: gradients, schedules, what the trainer counts."""
        strategy = self._module.trainer.strategy
        counters = [(o, o._on_before_step, o._on_after_step) for o in strategy._lightning_optimizers]
        schedules = [(c.scheduler, copy.deepcopy(c.scheduler.state_dict())) for c in strategy.lr_scheduler_configs]
        groups = [(group, dict(group)) for optimizer in strategy.optimizers for group in optimizer.param_groups]
        before = self._put(stepping)
        try:
            for wrapped, *_ in counters:
                wrapped._on_before_step = wrapped._on_after_step = do_nothing_closure
            with gradients_put_aside(self._module.parameters()), warnings.catch_warnings():
                # In a trial no optimizer steps before a schedule does.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                yield
        finally:
            self._put(before)
            for wrapped, on_before_step, on_after_step in counters:
                wrapped._on_before_step, wrapped._on_after_step = on_before_step, on_after_step
            for schedule, state in schedules:
                schedule.load_state_dict(state)
            for group, settings in groups:
                group.update(settings)


@contextmanager
def gradients_put_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let autograd write gradients inside, and put back afterwards what was there."""
    before = {id(p): (p, p.grad) for p in parameters}
    for p, _ in before.values():
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in before.values():
            p.grad = gradient


class _Traced(Stepping):
    """Notes the losses, and does nothing."""

    is_trial = True

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        self.losses.append(loss)

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        return result


class _Ordinary(Stepping):
    """Runs backward passes as without privacy, and notes what every optimizer would step by."""

    is_trial = True

    def __init__(self, following: Following) -> None:
        self.steps: list[Step] = []
        self._following = following

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        run()

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        gradients = {id(p): torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in _parameters(optimizer)}
        depends = any(map(self._following.depends, gradients.values()))
        self.steps.append(Step(optimizer, gradients, depends))
        return result


class _Recorded(Stepping):
    """Notes the book that every private optimizer would release."""

    is_trial = True

    def __init__(self, keeping: BookKeeping, groups: Groups) -> None:
        self.books: list[Book] = []
        self._keeping, self._groups = keeping, groups
        self._pending = PendingGradients(keeping, groups, in_trial=True)

    def backward(self, loss: Tensor, run: Callable[[], None]) -> None:
        self._pending.backward(run)

    def release(self, optimizer: Optimizer, result: Any) -> Any:
        if optimizer in self._groups:
            with self._keeping.paused():
                self.books.append(self._pending.take(optimizer))
        return result


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _all_equal(optimizer: Optimizer, runs: list[list[Step]]) -> bool:
    first, *others = [[step.gradients for step in run if step.optimizer is optimizer] for run in runs]
    return all(
        len(other) == len(first)
        and all(torch.equal(g[key], h[key]) for g, h in zip(first, other, strict=True) for key in g)
        for other in others
    )
