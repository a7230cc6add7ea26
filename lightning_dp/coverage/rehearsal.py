"""What is looked at in the place of a fit's first step.

Owns: the order in which a plan finds things out. Does not own: what is found out (``observing``, ``timing``), or that
nothing is trained, released or written meanwhile (``planning``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_dp.bookkeeping import Keeping
from lightning_dp.coverage.ahead import forecast_of
from lightning_dp.coverage.improving import improvement_of
from lightning_dp.coverage.observing import Bench, loop_coverage, observe_coverage
from lightning_dp.coverage.report import Plan
from lightning_dp.coverage.timing import time_ratio
from lightning_dp.errors import PrivacyError
from lightning_dp.strategies.measuring import Step, fastest_size
from lightning_dp.strategies.preparing import Found, Prepared, find, prepare
from lightning_dp.strategies.public_steps import PublicSteps
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import Stepping
from lightning_dp.strategies.trials import AutomaticTrial, ManualTrial

_SAMPLES_OF_THE_LOOP = 8


class Rehearsal:
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
        count(plan, self._module, self._trainer.optimizers)
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


def count(found: Plan, module: pl.LightningModule, optimizers: list[Any]) -> None:
    """Fill in how many parameters are trained, and which are not."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    frozen = [p for p in named.values() if not p.requires_grad]
    found.untrained = tuple(name for name, p in named.items() if held and p.requires_grad and id(p) not in held)
    found.num_trained = sum(p.numel() for name, p in named.items() if p.requires_grad and name not in found.untrained)
    found.frozen, found.num_frozen = len(frozen), sum(p.numel() for p in frozen)
