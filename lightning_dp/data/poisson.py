"""Poisson sampling: one batch that Lightning sees is one logical batch.

Owns: the draws and their division into physical batches. Does not own: what is done with a batch (``strategies``), or
the checks of the user's dataloader (``checks``).

Each unit, an example as a rule, is in a logical batch with probability q, independently of all others and of all other
batches (arXiv 1908.10530, definition 3). A logical batch of any size is processed in physical batches of bounded size.
The loader yields the first of them as an ordinary batch and hands out the others one by one, so that only two are in
memory at a time.

Several processes draw the same logical batch and share it out: process r of W takes every W-th unit of it from the r-th
on. So the logical batch is exactly a Poisson sample, and no unit is in it twice. They draw by a key that the first one
draws anew for each loader, and by the number of the step that an epoch begins with: however an epoch ends, whatever
workers have fetched ahead or one process has looked at by itself, the next one begins alike everywhere. Epochs that
begin with the same step draw the same; nothing was released between them.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr
from torch.utils.data import DataLoader

from lightning_dp.data.units import Units
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import SecretRandom, SharedRandom
from lightning_dp.processes import Processes


@dataclass(frozen=True)
class PhysicalBatch:
    """A batch as the user's ``collate_fn`` made it.

    Args:
        data: The batch.
        num_rows: How many samples it has, each a unit: B.
        num_real: How many of them were drawn, the first ones; the others are phantoms.
    """

    data: Any
    num_rows: int
    num_real: int


@dataclass(frozen=True)
class Drawn:
    """What is known of a physical batch when it is drawn.

    Args:
        num_rows: How many samples it has, phantoms included.
        num_real: How many of them were drawn.
        is_last: Whether it is the last one of its logical batch.
        step: The number of the logical batch in the run.
        sample_rate: With which the logical batch was drawn.
    """

    num_rows: int
    num_real: int
    is_last: bool
    step: int
    sample_rate: float


class PoissonLoader:
    """Draws logical batches from the dataset of an ordinary dataloader.

    Guarantee: the draws are independent and each unit has the probability of its step, if ``random`` is secret. What
    the processes deliver together is one draw; each has as many physical batches of it as any other.

    Args:
        loader: The user's dataloader: gives the dataset, ``collate_fn`` and the workers.
        units: What is drawn.
        sample_rate: q in (0, 1], by the number of the step.
        first_step: Returns the number of the step that comes next; asked when an epoch begins.
        num_batches: Logical batches in one epoch.
        max_physical_batch_size: The most units of a physical batch; the attribute may change between two epochs.
        random: Where the draws come from.
        constant_size: Whether every physical batch has ``max_physical_batch_size`` samples, phantoms included, so that
            its size tells nothing.
        processes: Share out the draws.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        units: Units,
        *,
        sample_rate: Callable[[int], float],
        first_step: Callable[[], int],
        num_batches: int,
        max_physical_batch_size: int,
        random: SecretRandom,
        constant_size: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.dataset = loader.dataset
        self.units, self.max_physical_batch_size = units, max_physical_batch_size
        self._rate_of, self._first_step = sample_rate, first_step
        self._num_batches, self._random, self._constant_size = num_batches, random, constant_size
        self._processes = processes or Processes()
        self._random_from = self._processes.common_random(random)
        self._chunks: deque[Drawn] = deque()
        self._rest: Iterator[PhysicalBatch] | None = None
        self._delivered: Drawn | None = None
        self._collate: Callable[[list[Any]], Any] = loader.collate_fn
        self._inner = _with_batches(loader, _Draws(self._draw_chunks))
        # Called before the first draw of an epoch: draws are divided long before they are used if workers fetch them.
        self.before_epoch: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        """Return the number of logical batches in one epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        """Yield the first physical batch of every logical batch."""
        self._chunks.clear()
        self.before_epoch()
        physical = iter(self._inner)
        for _ in range(self._num_batches):
            data = next(physical)
            self._delivered = self._chunks.popleft()
            rest = self._rest = self._after(self._delivered, physical)
            yield data
            for _ in rest:  # a batch that was skipped leaves its others behind
                pass

    def take(self) -> tuple[Drawn, Iterator[PhysicalBatch]]:
        """Return the sizes of the batch yielded last, and the other physical batches of its logical batch.

        Raises:
            PrivacyError: If they were taken before: one draw must be used for one release only.
        """
        if self._delivered is None or self._rest is None:
            raise PrivacyError(
                "a second training step was asked for on one draw of examples, which is accounted for one release. "
                "Optimizers and hooks that run the closure more than once per batch cannot be trained privately."
            )
        delivered, rest = self._delivered, self._rest
        self._delivered = None
        return delivered, rest

    def batch_of(self, units: list[int], first: Sequence[int] = ()) -> Any:
        """Return a batch of these units, made by the user's ``collate_fn``.

        Args:
            units: In their order; one may be there several times.
            first: Units that are fetched before the others, in the batch or not, so that those that are random are the
                same whatever else is in it.
        """
        examples_of = {unit: self.units.examples_of([unit]) for unit in dict.fromkeys([*first, *units])}
        fetched = {i: self._fetch(i) for examples in examples_of.values() for i in set(examples)}
        # Copies, as collating may change a sample.
        return self._collate([copy.deepcopy(fetched[i]) for unit in units for i in examples_of[unit]])

    def draw(self, sample_rate: float, random: SecretRandom | SharedRandom | None = None) -> list[int]:
        """Return the units of one logical batch, in their order.

        Args:
            sample_rate: q.
            random: Where the draw comes from, if not from the loader's own random numbers.

        From one drawn unit to the next it is ``floor(log(u) / log(1 - q)) + 1`` units for a uniform u in (0, 1], which
        is as far as from one success to the next in independent trials. So a draw takes time for those drawn, not for
        all N.
        """
        num_units, last = self.units.num_units, -1
        drawn: list[NDArray[np.int64]] = []
        random = random or self._random
        expected, log_of_rest = num_units * sample_rate, math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
        while last < num_units:
            gaps = np.floor(np.log(_positive(random, int(expected + 6 * math.sqrt(expected)) + 8)) / log_of_rest) + 1
            drawn.append(last + np.minimum(gaps, num_units + 1).astype(np.int64).cumsum())
            last = int(drawn[-1][-1])
        units = np.concatenate(drawn)
        found: list[int] = units[units < num_units].tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the draws are independent, so an epoch can be resumed anywhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""

    def _fetch(self, index: int) -> Any:
        many = getattr(self.dataset, "__getitems__", None)
        return many([index])[0] if callable(many) else self.dataset[index]

    def _draw_chunks(self) -> Iterator[list[int]]:
        """Yield the examples of physical batches and note their sizes in the order of the draws."""
        first = self._first_step()
        drawing = self._random_from(first)
        for step in range(first, first + self._num_batches):
            rate = self._rate_of(step)
            chosen = self.draw(rate, drawing)
            share = chosen[self._processes.rank :: self._processes.size]
            chunks = _divided(share, self._num_chunks(len(chosen)))
            for k, chunk in enumerate(chunks):
                # Phantoms, which are given the weight zero: one for an empty draw, or as many as hide its size. They
                # repeat what was drawn, so that what a training step logs is about the draw.
                rows = self.max_physical_batch_size if self._constant_size else max(len(chunk), 1)
                self._chunks.append(Drawn(rows, len(chunk), k == len(chunks) - 1, step, rate))
                examples = self.units.examples_of(chunk or share[:1] or [0], self._random)
                yield list(islice(cycle(examples), rows * self.units.examples_per_unit))

    def _num_chunks(self, num_drawn: int) -> int:
        """Return how many physical batches the largest share of a draw needs: every process has as many.

        Then collectives of the user's in a training step meet everywhere. Shares differ by one unit at most, so this is
        no more than the share of this process needs, or one phantom more.
        """
        return max(1, math.ceil(math.ceil(num_drawn / self._processes.size) / self.max_physical_batch_size))

    def _after(self, chunk: Drawn, physical: Iterator[Any]) -> Iterator[PhysicalBatch]:
        while not chunk.is_last:
            data = next(physical)
            chunk = self._chunks.popleft()
            yield PhysicalBatch(data, chunk.num_rows, chunk.num_real)


class _Draws:
    """The batch sampler of the inner dataloader."""

    def __init__(self, draw: Callable[[], Iterator[list[int]]]) -> None:
        self._draw = draw

    def __iter__(self) -> Iterator[list[int]]:
        return self._draw()


def largest_draw(num_units: int, sample_rate: float) -> int:
    """Return a size that a Poisson sample exceeds with a probability below 1e-20: in no run there will ever be.

    By the Chernoff bound: at least m of N are drawn with a probability of at most ``exp(-N KL(m / N || q))``.
    """

    def divergence(m: int) -> float:
        share = m / num_units
        return num_units * float(rel_entr(share, sample_rate) + rel_entr(1 - share, 1 - sample_rate))

    sizes = range(math.ceil(sample_rate * num_units), num_units + 1)
    return sizes[min(bisect_left(sizes, -math.log(1e-20), key=divergence), len(sizes) - 1)]


def even_chunks(indices: list[int], most: int) -> list[list[int]]:
    """Divide into as few chunks of at most ``most`` as possible, of nearly equal size; at least one chunk."""
    return _divided(indices, max(1, math.ceil(len(indices) / most)))


def _divided(indices: list[int], count: int) -> list[list[int]]:
    """Divide into so many chunks, of nearly equal size."""
    size, longer = divmod(len(indices), count)
    starts = [k * size + min(k, longer) for k in range(count + 1)]
    return [indices[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def _positive(random: SecretRandom | SharedRandom, size: int) -> NDArray[np.float64]:
    """Return independent uniform values in (0, 1], with 53 bits after their first one, however small they are."""
    coarse, fine = random.uniform(2 * size).numpy().reshape(2, size)
    values: NDArray[np.float64] = (1 - coarse) - fine * 2**-53
    return values


def _with_batches(loader: DataLoader[Any], batches: Iterable[list[int]]) -> DataLoader[Any]:
    """Return the user's dataloader with other batches; a plain one, as every setting of it is an attribute."""
    workers: dict[str, Any] = (
        {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
        if loader.num_workers > 0
        else {}
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **workers,
    )
