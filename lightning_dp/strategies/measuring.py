"""What a physical batch costs, found by trying: time and memory of training steps that leave no trace.

Owns: the samples that are tried, and how much memory may be used. Does not own: which sizes are tried and which is
chosen (``fastest``), what is put back (``undisturbed``), or the division of draws (``data``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle, islice
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_dp.bookkeeping import BookKeeping, NotObserved
from lightning_dp.bookkeeping.noting import now
from lightning_dp.data import PoissonLoader, even_chunks
from lightning_dp.noise import SecretRandom
from lightning_dp.private_step import PrivateStep
from lightning_dp.strategies.fastest import Choice, fastest
from lightning_dp.strategies.joint_bench import JointBench
from lightning_dp.strategies.memory import Memory, OutOfMemory, is_out_of_memory, memory_of
from lightning_dp.strategies.preparing import Parameters, Prepared, look_again
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.stepping import Stepping
from lightning_dp.strategies.trials import AutomaticTrial, gradients_put_aside
from lightning_dp.strategies.undisturbed import undisturbed_at_full_speed

_NUM_UNITS = 64
"""How many units are tried, in batches of all sizes."""

_SHARE = 0.8
"""Of the memory that is free: samples may be longer than all that are tried."""

_STATES = 2
"""Values that an optimizer may keep of every parameter once it has stepped; Adam keeps two."""

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A training step that can be run on any samples.

    Args:
        run: The run that it belongs to.
        module: The user's module.
        moved: Does to a batch what is done before a training step.
        on: Runs the training step on it.
        put: Puts a `Stepping` behind the hooks of the strategy, and returns the one that was there.
    """

    run: PrivateRun
    module: pl.LightningModule
    moved: Callable[[Any], Any]
    on: Callable[..., Any]
    put: Callable[[Stepping], Stepping]

    def look_again(self, keeping: BookKeeping) -> None:
        """Observe it once more, where it took a branch that it did not take before."""
        look_again(self.module, self.run, lambda data, *at: self.on(self.moved(data), *at), self.put, keeping)


def fastest_size(prepared: Prepared, step: Step) -> Choice:
    """Return the physical batch size, in units, with the least time for each of them, within the memory there is.

    Some units of the training data, drawn at random, are run forward and backward up to their clipped sum, and nothing
    comes of it. The memory of a size is that of a batch that holds the longest of them only; 80 % of what is free may
    be used. What is longer or needs more by a quarter than all 64 that were drawn may still be too large.

    Guarantee: nothing is released or booked, and no draw of the loader, generator, parameter or buffer changes. What
    is released later does not depend on the choice, up to rounding: a clipped sum is the same however a draw is
    divided. The choice itself, and time and memory that are shown with it, tell what sizes of a few samples tell, and
    epsilon does not cover that.

    Args:
        prepared: The model, observed.
        step: Its training step; the loader of its run gives the samples, and keeps its size.
    """
    loader, keeping = step.run.loader, prepared.keeping
    assert loader is not None, "settled with the dataloader"
    assert isinstance(keeping, BookKeeping), "the loop has batches of one sample"
    device = step.module.trainer.strategy.root_device
    memory, processes = memory_of(device), step.run.processes
    if memory is None or None in processes.gather(memory):
        reason = f"as without 'auto', since what memory is free on device '{device}' cannot be found out here"
        return Choice(loader.max_physical_batch_size, reason)
    bench = TrainingBench(prepared.trained, keeping, loader, step, memory)
    try:
        most = math.ceil(_usual_draw(loader.units.num_units, step.run.schedule.largest_rate) / processes.size)
        return fastest(JointBench(bench, processes, device), most)
    finally:
        bench.drop()


class TrainingBench:
    """A training step that is tried on a few units of the training data; see ``fastest.Bench``.

    Args:
        trained: The parameters that are trained, by name.
        keeping: Finds its per-sample gradients.
        loader: Gives the samples, through the user's own ``collate_fn``.
        step: The training step.
        memory: Where all of it lies.
    """

    def __init__(
        self,
        trained: Parameters,
        keeping: BookKeeping,
        loader: PoissonLoader,
        step: Step,
        memory: Memory,
    ) -> None:
        self._trained, self._keeping, self._loader, self._step = trained, keeping, loader, step
        self._memory, self._units = memory, _some_of(loader.units.num_units)
        self._trial = AutomaticTrial(step.module, step.on)
        # Sums and random numbers of its own: those of the fit are not touched.
        self._sums = PrivateStep(trained, SecretRandom(), mean_loss=step.run.settings.loss_reduction == "mean")
        self._sums.begin(step.run.schedule.base)

    def room(self) -> float:
        """Return the share of the free memory that may be used, once the sums and all that is there only once exist."""
        self.time(1, 1)
        self._memory.clean_up()
        free = self._tried(self._memory.free)  # beside the copies that are kept while something is tried
        return max(0.0, _SHARE * free - self._states_to_come())

    def weigh(self, size: int) -> float:
        """Return what a batch of the longest sample needs, on its way to the device and through the step."""
        units = [self._longest] * size
        return self._tried(lambda: self._memory.peak_of(lambda: self._run(self._batch(units), size)))

    def time(self, size: int, count: int) -> float:
        """Return the seconds of one unit; fetching and moving do not count."""
        units = list(islice(cycle(self._units), count))
        return self._tried(partial(self._seconds, even_chunks(units, size))) / count

    def drop(self) -> None:
        """Leave nothing behind."""
        self._keeping.abandon()
        self._sums.drop()
        self._memory.clean_up()

    def _seconds(self, chunks: list[list[int]]) -> float:
        batches = [self._batch(chunk) for chunk in chunks]
        began = now()
        for chunk, batch in zip(chunks, batches, strict=True):
            self._run(batch, len(chunk))
        return now() - began

    def _batch(self, units: list[int]) -> Any:
        return self._step.moved(self._loader.batch_of(units))

    def _run(self, batch: Any, num_samples: int) -> None:
        """Run a step up to its clipped sum."""
        with self._keeping.recording(num_samples):
            loss = self._trial.loss(batch)
        if loss is None:
            self._keeping.abandon()
            return
        with self._keeping.recording():
            loss.backward()
        self._sums.collect(self._keeping.close(), num_samples)

    def _tried(self, action: Callable[[], T]) -> T:
        """Return what an action returns, which leaves no trace.

        Raises:
            OutOfMemory: If it did not fit.
        """
        with suppress(NotObserved):
            return self._attempt(action)
        self._step.look_again(self._keeping)
        return self._attempt(action)

    def _attempt(self, action: Callable[[], T]) -> T:
        try:
            with self._without_trace():
                return action()
        except (RuntimeError, MemoryError) as error:
            self._keeping.abandon()
            if not is_out_of_memory(error):
                raise
        self._memory.clean_up()  # only here is the error forgotten, which holds all that was computed
        raise OutOfMemory

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        module = self._step.module
        parameters = [*self._trained.values(), *module.parameters()]
        with gradients_put_aside(parameters), undisturbed_at_full_speed(module):
            yield

    @cached_property
    def _longest(self) -> int:
        """The unit whose sample has the most elements."""
        with undisturbed_at_full_speed(self._step.module):
            return max(self._units, key=lambda unit: _num_elements(self._loader.batch_of([unit])))

    def _states_to_come(self) -> int:
        """Return what optimizers will hold after their first step, if none was made yet."""
        optimizers = self._step.module.trainer.optimizers
        if all(optimizer.state for optimizer in optimizers):
            return 0
        return _STATES * sum(p.numel() * p.element_size() for p in self._trained.values())


def _usual_draw(num_units: int, sample_rate: float) -> int:
    """Return a size that one in about 700 draws exceeds, by three standard deviations; that one is divided."""
    mean = num_units * sample_rate
    return min(num_units, math.ceil(mean + 3 * math.sqrt(mean * (1 - sample_rate))))


def _some_of(count: int) -> list[int]:
    """Return some of so many units, by random numbers of their own."""
    random = SecretRandom()
    few = random.uniform(count).argsort() if count <= _NUM_UNITS else random.uniform(_NUM_UNITS) * count
    return few.long().tolist()


def _num_elements(batch: Any) -> int:
    return sum(t.numel() for t in tree_leaves(batch) if isinstance(t, Tensor))
