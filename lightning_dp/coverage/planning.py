"""`plan`: a fit up to its first step, which is looked at instead of made.

Owns: what of a trainer must be kept still so that nothing is trained, released or written. Does not own: what is found
out meanwhile (``observing``, ``timing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_dp.bookkeeping import BookKeeping, Keeping, LoopKeeping
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.coverage.observing import Trial, loop_coverage, observe_coverage
from lightning_dp.coverage.report import Plan
from lightning_dp.coverage.table import print_plan
from lightning_dp.coverage.timing import time_ratio
from lightning_dp.data import PoissonLoader
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.strategies import DPStrategy, checks
from lightning_dp.strategies.observing import Observer
from lightning_dp.strategies.run import PrivateRun

_SAMPLES_OF_THE_LOOP = 8

_NO_STEP = (
    "the fit would end before its first step: max_steps, max_epochs or limit_train_batches is zero or reached already, "
    "or there is no training_step."
)


def plan(trainer: pl.Trainer, model: pl.LightningModule, *args: Any, show: bool = True, **kwargs: Any) -> Plan:
    """Show and return what ``trainer.fit`` with the same arguments would do to every parameter, without training.

    Everything up to the first step runs as in a fit: ``setup``, ``configure_model``, ``configure_optimizers``,
    ``on_fit_start`` and ``on_train_start`` of module and callbacks. What later hooks change is not seen. Then the model
    is observed and some physical batches are run, forward and backward, and the fit ends.

    Guarantee: no step is made, nothing is released, no budget is spent; parameters and buffers are as those hooks left
    them, random number generators as before; no logger, checkpoint or journal writes. The plan holds shapes, times and
    settings, and the words of errors; nothing else depends on the training data.

    Args:
        trainer: With a `DPStrategy`.
        model: The module.
        *args: As for ``trainer.fit``: a dataloader or a datamodule.
        show: Whether to print the plan.
        **kwargs: As for ``trainer.fit``.

    Raises:
        PrivacyConfigurationError: If the trainer has another strategy. What a fit would refuse is in the plan.

    Example:
        >>> plan(trainer, model, train_dataloader)  # doctest: +SKIP
    """
    found, strategy = Plan(type(model).__name__), trainer.strategy
    if not isinstance(strategy, DPStrategy):
        raise PrivacyConfigurationError(
            f"a plan with strategy={type(strategy).__name__}: expected a private strategy, Trainer(strategy="
            "DPStrategy(...)); of any other fit there is nothing to say here."
        )
    rehearsed: list[bool] = []

    def rehearse(*parts: Any) -> None:
        rehearsed.append(True)
        _Rehearsal(found, trainer, model, *parts).run()
        raise _TunerExitException  # ends a fit without any hook but teardown, as Lightning's own tuner does

    with _nothing_written(trainer), strategy.rehearsing(rehearse):
        try:
            trainer.fit(model, *args, **kwargs)
        except PrivacyError as error:
            found.errors.append(str(error))
    if not rehearsed:
        _count(found, model, [])
        found.errors = found.errors or [_NO_STEP]
    if show:
        print_plan(found)
    return found


class _SetUpOnly(pl.Callback):
    """Sends away the callbacks that write or show something; on an error, all others too."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        kept = [c for c in _callbacks(trainer) if not isinstance(c, Checkpoint | ProgressBar | ModelSummary)]
        _callbacks(trainer)[:] = kept  # in place: the list is being walked

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _callbacks(trainer)[:] = [self]


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


@contextmanager
def _nothing_written(trainer: pl.Trainer) -> Iterator[None]:
    """Keep loggers, profiler and writing callbacks off a trainer, and give it and all generators back as they were."""
    state = RandomState.of_all()
    names = ("callbacks", "loggers", "profiler", "num_sanity_val_steps")
    before = {name: getattr(trainer, name) for name in names}
    still = (
        [_SetUpOnly(), *_callbacks(trainer)],
        [DummyLogger()] if trainer.loggers else [],
        PassThroughProfiler(),
        0,
    )
    for name, value in zip(names, still, strict=True):
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
        state.restore()


class _Rehearsal:
    """What is looked at in the place of the first step.

    Args:
        found: What is filled in.
        trainer: The trainer of the fit.
        module: The user's module.
        run: The private run.
        moved: Does to a batch what is done before a training step.
        step: The training step.
    """

    def __init__(
        self,
        found: Plan,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        run: PrivateRun,
        moved: Callable[[Any], Any],
        step: Callable[..., Any],
    ) -> None:
        self._found, self._trainer, self._module, self._run, self._moved = found, trainer, module, run, moved
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._step = (lambda batch: step(batch, 0)) if takes_index else step
        self._is_loop = run.settings.clipping_engine == "loop"

    def run(self) -> None:
        """Find out everything, as far as nothing is refused."""
        loader = self._run.loader
        assert loader is not None, "settled with the dataloader"
        self._settings(loader)
        optimizers = self._trainer.optimizers
        _count(self._found, self._module, optimizers)
        self._tried(self._run.budget.check_next)
        if self._tried(lambda: checks.check_hooks(checks.trained_parameters(self._module, optimizers)[0])):
            self._model(self._trial(loader))

    def _settings(self, loader: PoissonLoader) -> None:
        found, run, budget = self._found, self._run, self._run.budget
        assert run.mechanism is not None, "settled with the dataloader"
        found.engine, found.num_examples = run.settings.clipping_engine, loader.num_examples
        found.expected_batch_size, found.sample_rate = run.mechanism.expected_batch_size, run.mechanism.sample_rate
        found.physical_batch_size = loader.max_physical_batch_size
        found.noise_multiplier, found.target_epsilon = run.mechanism.noise_multiplier, budget.target_epsilon
        found.delta, found.planned_steps = budget.delta, budget.planned_steps
        limits = [] if budget.releases_left is None else [budget.releases_left]
        if budget.planned_steps is not None:
            limits.append(max(0, budget.planned_steps - self._trainer.global_step))
        found.steps = min(limits, default=None)
        found.epsilon = None if found.steps is None else budget.epsilon_after(found.steps)

    def _trial(self, loader: PoissonLoader) -> Trial:
        trained, others = checks.trained_parameters(self._module, self._trainer.optimizers)
        wanted = _SAMPLES_OF_THE_LOOP if self._is_loop else loader.max_physical_batch_size
        count = min(wanted, loader.num_examples)
        indices = [k * loader.num_examples // count for k in range(count)]
        mean_loss = self._run.settings.loss_reduction == "mean"
        return Trial(
            module=self._module,
            trained=trained,
            others=others,
            batch=self._moved(loader.batch_of(indices)),
            num_samples=count,
            singles=tuple(self._moved(loader.batch_of([i])) for i in indices) if self._is_loop else (),
            run_step=self._step,
            observer=Observer(self._module, loader, lambda data: self._step(self._moved(data)), mean_loss=mean_loss),
        )

    def _model(self, trial: Trial) -> None:
        found = self._found
        if self._is_loop:
            self._tried(lambda: setattr(found, "coverage", loop_coverage(trial)))
        else:
            self._tried(partial(self._observe, trial))
        if found.errors or found.coverage is None or found.coverage.refused:
            found.self_check = "not run: something is refused"
            return
        keeping = (LoopKeeping if self._is_loop else BookKeeping)(trial.trained, trial.others)
        if self._tried(partial(self._check, trial, keeping)):
            self._tried(partial(self._time, trial, keeping))

    def _observe(self, trial: Trial) -> None:
        self._found.coverage, error = observe_coverage(trial)
        if error:
            self._found.errors.append(error)

    def _check(self, trial: Trial, keeping: Keeping) -> None:
        found, wanted = self._found, self._run.settings.self_check
        found.self_check = "failed: the reason is given above"
        trial.observer.observe(keeping, dict(trial.trained), check=wanted)
        if self._is_loop:
            found.self_check = "not needed: in the loop every sample is alone in its batch"
        elif not wanted:
            found.self_check = "switched off (self_check=False)"
        elif trial.observer.num_samples < 2:
            found.self_check = "not run: it needs two different samples"
        else:
            found.self_check = f"passed, on {trial.observer.num_samples} samples"

    def _time(self, trial: Trial, keeping: Keeping) -> None:
        """Time the private way against the ordinary one."""
        step = self._run.private_step(trial.trained)
        batches = [(single, 1) for single in trial.singles] or [(trial.batch, trial.num_samples)]

        def private() -> None:
            for batch, num_samples in batches:
                with keeping.recording(num_samples):
                    loss = trial.loss(batch)
                with keeping.recording():
                    loss.backward()
                step.collect(keeping.close(), num_samples)
            step.drop()

        def ordinary() -> None:
            trial.loss().backward()
            trial.drop_gradients()

        with trial.without_trace():
            self._found.time_ratio = time_ratio(private, ordinary)
        self._found.timed_samples = trial.num_samples

    def _tried(self, action: Callable[[], None]) -> bool:
        """Note the refusal of an action; return whether there was none."""
        try:
            action()
        except PrivacyError as error:
            self._found.errors.append(str(error))
            return False
        return True


def _count(found: Plan, module: pl.LightningModule, optimizers: list[Any]) -> None:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    frozen = [p for p in named.values() if not p.requires_grad]
    found.untrained = tuple(name for name, p in named.items() if held and p.requires_grad and id(p) not in held)
    found.num_trained = sum(p.numel() for name, p in named.items() if p.requires_grad and name not in found.untrained)
    found.frozen, found.num_frozen = len(frozen), sum(p.numel() for p in frozen)
