"""`plan`: a fit up to its first step, which is looked at instead of made.

Owns: what of a trainer must be kept still so that nothing is trained, released or written. Does not own: what is found
out meanwhile (``observing``, ``timing``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_dp.bookkeeping import Keeping
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.coverage.ahead import forecast_of
from lightning_dp.coverage.improving import improvement_of
from lightning_dp.coverage.observing import Bench, loop_coverage, observe_coverage
from lightning_dp.coverage.report import Plan
from lightning_dp.coverage.table import print_plan
from lightning_dp.coverage.timing import time_ratio
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.forecasting.figure import ForecastFigure
from lightning_dp.forecasting.improvement import check_ending, write_improvement
from lightning_dp.strategies import DPStrategy
from lightning_dp.strategies.measuring import Step, fastest_size
from lightning_dp.strategies.preparing import Found, Prepared, find, prepare
from lightning_dp.strategies.public_steps import PublicSteps
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import Stepping
from lightning_dp.strategies.trials import AutomaticTrial, ManualTrial

_SAMPLES_OF_THE_LOOP = 8

_NO_STEP = (
    "the fit would end before its first step: max_steps, max_epochs or limit_train_batches is zero or reached already, "
    "or there is no training_step."
)


def plan(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    *args: Any,
    show: bool = True,
    plot: str | Path | None = None,
    improvement: bool | str = False,
    **kwargs: Any,
) -> Plan:
    """Show and return what ``trainer.fit`` with the same arguments would do to parameters and budget, without training.

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
        plot: A file that the budget is drawn into, such as ``plan.png``; it is not written if a fit is refused before
            its budget is known.
        improvement: Whether to estimate on public data what a step improves, for several batch sizes; or a file for
            that table, too, that ends in ``.json`` or ``.md``.
        **kwargs: As for ``trainer.fit``.

    Raises:
        PrivacyConfigurationError: If the trainer has another strategy, or a plot or an improvement cannot be had. What
            a fit would refuse is in the plan.

    Example:
        >>> plan(trainer, model, train_dataloader)  # doctest: +SKIP
    """
    found, strategy = Plan(type(model).__name__), trainer.strategy
    if not isinstance(strategy, DPStrategy):
        raise PrivacyConfigurationError(
            f"a plan with strategy={type(strategy).__name__}: expected a private strategy, Trainer(strategy="
            "DPStrategy(...)); of any other fit there is nothing to say here."
        )
    figure = None if plot is None else ForecastFigure(plot)
    file = check_ending(improvement) if isinstance(improvement, str) else None
    rehearsed: list[bool] = []
    not_improved: list[PrivacyError] = []

    def rehearse(*parts: Any) -> None:
        rehearsed.append(True)
        rehearsal = _Rehearsal(found, trainer, model, *parts)
        rehearsal.run()
        if improvement and not found.is_refused:
            try:
                rehearsal.improve(strategy.public)
            except PrivacyError as error:
                not_improved.append(error)
        raise _TunerExitException  # ends a fit without any hook but teardown, as Lightning's own tuner does

    with _nothing_written(trainer), strategy.rehearsing(rehearse):
        try:
            trainer.fit(model, *args, **kwargs)
        except PrivacyError as error:
            found.errors.append(str(error))
    if not_improved:
        raise not_improved[0]
    if not rehearsed:
        _count(found, model, [])
        found.errors = found.errors or [_NO_STEP]
    if not strategy.is_global_zero:  # of several processes one shows and writes
        return found
    if show:
        print_plan(found)
    if figure is not None and found.forecast is not None:
        figure.save(found.forecast)
    if file is not None and found.improvement is not None:
        write_improvement(found.improvement, file)
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
        plan: What is filled in.
        trainer: The trainer of the fit.
        module: The user's module.
        run: The private run.
        moved: Does to a batch what is done before a training step.
        step: The training step of a batch, with a ``batch_idx`` if it is to be another than 0.
        put: Puts a `Stepping` behind the hooks of the strategy.
    """

    def __init__(
        self,
        plan: Plan,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        run: PrivateRun,
        moved: Callable[[Any], Any],
        step: Callable[..., Any],
        put: Callable[[Stepping], Stepping],
    ) -> None:
        self._plan, self._trainer, self._module, self._run = plan, trainer, module, run
        self._moved, self._step, self._put = moved, step, put
        self._prepared: Prepared | None = None
        self._found: Found | None = None
        self._is_loop = run.settings.clipping_engine == "loop" and module.automatic_optimization

    def run(self) -> None:
        """Find out everything, as far as nothing is refused."""
        plan, run = self._plan, self._run
        _count(plan, self._module, self._trainer.optimizers)
        self._tried(run.budget.check_next)
        found: list[Found] = []
        if self._tried(lambda: found.append(find(self._module, run, self._run_step, self._put))):
            held = {id(p) for o in found[0].public for group in o.param_groups for p in group["params"]}
            plan.public = tuple(name for name, p in self._module.named_parameters() if id(p) in held)
            self._find_size()
            self._model(self._bench(found[0]))
            self._found = found[0]
        self._settings(len(found[0].steps) if found else 1)

    def improve(self, public: PublicSteps | None) -> None:
        """Find out what steps improve.

        Args:
            public: The public part of the fit, if it has one.

        Raises:
            PrivacyError: If that cannot be found out.
        """
        assert self._found is not None, "otherwise the fit is refused"
        self._plan.improvement = improvement_of(self._module, self._run, public, self._found, self._plan.forecast)

    def _run_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return self._step(self._moved(batch), batch_idx)

    def _find_size(self) -> None:
        """Find the fastest physical batch size, where it is asked for and nothing stands in the way."""
        if not (self._run.settings.finds_size and self._module.automatic_optimization):
            return
        with suppress(PrivacyError):  # told later, with all else that is refused
            self._prepare()
        if self._prepared is not None:
            self._tried(partial(self._find_size_of, self._prepared))

    def _find_size_of(self, prepared: Prepared) -> None:
        loader = self._run.loader
        assert loader is not None, "settled with the dataloader"
        choice = fastest_size(prepared, Step(self._run, self._module, self._moved, self._step, self._put))
        self._plan.physical_batch = choice.sentence(loader.units.unit)
        loader.max_physical_batch_size = choice.size

    def _settings(self, steps_per_draw: int) -> None:
        plan, run, budget, loader = self._plan, self._run, self._run.budget, self._run.loader
        assert loader is not None, "settled with the dataloader"
        mechanism, units = run.schedule.base, loader.units
        plan.engine, plan.num_examples = run.settings.clipping_engine, len(loader.dataset)  # type: ignore[arg-type]
        plan.num_users = units.num_units if units.unit == "user" else None
        rows, plan.views_per_example = units.examples_per_unit, units.views
        plan.examples_per_user = rows // units.views
        plan.expected_batch_size = mechanism.expected_batch_size * plan.examples_per_user
        plan.sample_rate = mechanism.sample_rate
        plan.physical_batch_size = loader.max_physical_batch_size * rows
        plan.clipping, plan.max_grad_norm = str(mechanism.clipping), mechanism.clipping.max_grad_norm
        plan.noise_multiplier, plan.target_epsilon = mechanism.noise_multiplier, budget.target_epsilon
        plan.delta, plan.planned_steps = budget.delta, budget.planned_steps
        plan.steps_per_batch = max(1, steps_per_draw)
        left = None
        if budget.planned_steps is not None:
            left = max(0, budget.planned_steps - budget.step)  # public steps release nothing
        plan.steps = min((limit for limit in (left, budget.releases_left) if limit is not None), default=None)
        plan.epsilon = None if plan.steps is None else budget.epsilon_after(plan.steps)
        plan.forecast = forecast_of(run, left)
        plan.public_steps = run.mixing.sentence if run.mixing is not None else ""

    def _bench(self, found: Found) -> Bench:
        loader = self._run.loader
        assert loader is not None, "settled with the dataloader"
        wanted = _SAMPLES_OF_THE_LOOP if self._is_loop else loader.max_physical_batch_size
        count = min(wanted, loader.units.num_units)
        indices = [k * loader.units.num_units // count for k in range(count)]
        manual: ManualTrial | None = None
        if isinstance(found.trial, ManualTrial):
            manual = ManualTrial(self._module, self._step, self._put)
            manual.groups = found.trial.groups
        return Bench(
            module=self._module,
            found=found,
            trial=manual or AutomaticTrial(self._module, self._step),
            batch=self._moved(loader.batch_of(indices)),
            num_samples=count,
            singles=tuple(self._moved(loader.batch_of([i])) for i in indices) if self._is_loop else (),
        )

    def _model(self, bench: Bench) -> None:
        plan = self._plan
        self._tried(partial(self._observe, bench))
        if plan.errors or plan.coverage is None or plan.coverage.refused:
            plan.self_check = "not run: something is refused"
            return
        plan.self_check = "failed: the reason is given above"
        if self._tried(self._prepare) and self._prepared is not None:
            plan.self_check = self._passed(bench.found.observer.num_samples)
            self._tried(partial(self._time, bench, self._prepared.keeping))

    def _prepare(self) -> None:
        if self._prepared is None:
            self._prepared = prepare(self._module, self._run, self._run_step, self._put)

    def _observe(self, bench: Bench) -> None:
        if self._is_loop:
            self._plan.coverage = loop_coverage(bench)
            return
        self._plan.coverage, problem = observe_coverage(bench)
        if problem:
            self._plan.errors.append(problem)

    def _passed(self, num_samples: int) -> str:
        if self._is_loop:
            return "not needed: in the loop every sample is alone in its batch"
        if not self._run.settings.self_check:
            return "switched off (self_check=False)"
        return f"passed, on {num_samples} samples" if num_samples > 1 else "not run: it needs two different samples"

    def _time(self, bench: Bench, keeping: Keeping) -> None:
        """Time the private way against the ordinary one."""
        step = self._run.private_step(bench.found.trained)
        batches = [(single, 1) for single in bench.singles] or [(bench.batch, bench.num_samples)]

        def private() -> None:
            step.begin(self._run.schedule.base)
            for batch, num_samples in batches:
                for book in bench.books(keeping, batch, num_samples):
                    step.collect(book, num_samples)
            step.drop()

        def ordinary() -> None:
            bench.run_ordinary()
            bench.drop_gradients()

        with bench.without_trace():
            self._plan.time_ratio = time_ratio(private, ordinary)
        self._plan.timed_samples = bench.num_samples

    def _tried(self, action: Callable[[], None]) -> bool:
        """Note the refusal of an action; return whether there was none."""
        try:
            action()
        except PrivacyError as error:
            self._plan.errors.append(str(error))
            return False
        return True


def _count(found: Plan, module: pl.LightningModule, optimizers: list[Any]) -> None:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    frozen = [p for p in named.values() if not p.requires_grad]
    found.untrained = tuple(name for name, p in named.items() if held and p.requires_grad and id(p) not in held)
    found.num_trained = sum(p.numel() for name, p in named.items() if p.requires_grad and name not in found.untrained)
    found.frozen, found.num_frozen = len(frozen), sum(p.numel() for p in frozen)
