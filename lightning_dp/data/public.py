"""Public batches: an endless stream of them, and the loader that yields them in the place of private ones.

Owns: where a resumed stream goes on, and that nothing private is drawn while public steps are made. Does not own: which
step is public (``strategies.mixing``), or the draws (``poisson``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset

from lightning_dp.data.poisson import PoissonLoader, _with_batches
from lightning_dp.data.private_dataset import PrivateDataset, holds_private
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.processes import Processes

_END = object()


class PublicStream:
    """Batches of public data, pass after pass without end.

    A plain dataloader is resumed by its seed and by fetching again what was fetched of a pass; one that has
    ``state_dict`` and ``load_state_dict`` by these. What draws random numbers elsewhere than from torch's generator on
    the CPU, or from a ``generator`` that it was given, is not put back.

    Several processes read in the same order, and each takes its share of every pass, as far as that can be divided:
    a dataloader of a class of its own, or of an IterableDataset, is read in full by each.

    Args:
        loader: The user's public dataloader.
        processes: Share out the batches.
    """

    def __init__(self, loader: DataLoader[Any], processes: Processes | None = None) -> None:
        self._processes = processes or Processes()
        self.loader, self._loader = loader, _shared_out(loader, self._processes)
        self._iterator: Iterator[Any] | None = None
        self._seed: int | None = None
        self._pass = self._taken = 0
        self._inner: dict[str, Any] | None = None

    def __iter__(self) -> PublicStream:
        """Return itself."""
        return self

    @property
    def num_batches(self) -> int:
        """The number of batches in a pass."""
        return len(self._loader)

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            PrivacyConfigurationError: If a pass has no batch.
        """
        iterator = self._begun()
        batch = next(iterator, _END)
        if batch is _END:
            self._pass, self._taken, self._iterator = self._pass + 1, 0, None
            batch = next(self._begun(), _END)
        if batch is _END:
            raise PrivacyConfigurationError("the public dataloader has no batch: expected at least one.")
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is."""
        loader: Any = self._loader
        inner = loader.state_dict() if _is_stateful(loader) and self._iterator is not None else self._inner
        return {"seed": self._seed, "pass": self._pass, "taken": self._taken, "loader": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream was."""
        self._seed, self._pass, self._taken = state["seed"], state["pass"], state["taken"]
        self._inner, self._iterator = state["loader"], None

    def _begun(self) -> Iterator[Any]:
        if self._iterator is None:
            self._iterator = self._begin()
        return self._iterator

    def _begin(self) -> Iterator[Any]:
        """Begin a pass, with random numbers of its own, so that its order is known again after a resume."""
        if self._seed is None:
            self._seed = self._processes.broadcast(int(torch.randint(2**62, ())))
        set_epoch = getattr(self.loader.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._pass)
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(self._seed + self._pass)
            return self._resumed()
        finally:
            torch.set_rng_state(state)

    def _resumed(self) -> Iterator[Any]:
        """Return an iterator that has drawn its order already."""
        if self._inner is not None and _is_stateful(self._loader):
            self._loader.load_state_dict(self._inner)  # type: ignore[attr-defined]
            self._inner = None
            return iter(self._loader)
        iterator = iter(self._loader)
        for _ in islice(iterator, self._taken):
            pass
        first = next(iterator, _END)
        return iter(()) if first is _END else _chained(first, iterator)


class _Share(Sampler[Any]):
    """What one of several processes takes of an order that all of them draw: as much as any other takes.

    Args:
        order: The order: indices, or batches of them.
        processes: Draw it alike.
    """

    def __init__(self, order: Any, processes: Processes) -> None:
        self._order, self._rank, self._size = order, processes.rank, processes.size

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._size)

    def __iter__(self) -> Iterator[Any]:
        every = list(self._order)
        missing = len(self) * self._size - len(every)
        return iter([*every, *islice(cycle(every), missing)][self._rank :: self._size])


def _shared_out(loader: DataLoader[Any], processes: Processes) -> DataLoader[Any]:
    is_divided = processes.size == 1 or isinstance(loader.sampler, DistributedSampler)
    if is_divided or type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return loader
    if type(loader.batch_sampler) is not BatchSampler:
        return _with_batches(loader, _Share(loader.batch_sampler or loader.sampler, processes))
    share = _Share(loader.sampler, processes)
    return _with_batches(loader, BatchSampler(share, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last))


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


@dataclass(frozen=True)
class Delivered:
    """What the loader yielded last.

    Args:
        weight: Of the public gradient in this step, in [0, 1]; 1: the batch is public, and nothing private was drawn.
        public: The public batch beside a private one, if both take part in the step.
    """

    weight: float
    public: Any = None

    @property
    def is_public(self) -> bool:
        """Whether public data is alone in the step."""
        return self.weight == 1


class MixedLoader:
    """Yields, for each step, a public batch or the first physical batch of a private draw.

    Guarantee: while the weight is 1, the private loader is not iterated: no example is drawn, fetched or prefetched.

    Args:
        private: Draws from the private data; an epoch is as long as one of its epochs.
        public: Gives public batches.
        weight: Returns the weight of the public gradient in the step that comes next.
        before_private: Called before a private draw, first of all in each epoch that has one.
    """

    def __init__(
        self,
        private: PoissonLoader,
        public: PublicStream,
        *,
        weight: Callable[[], float],
        before_private: Callable[[], None],
    ) -> None:
        self._private, self._public = private, public
        self._weight, self._before_private = weight, before_private
        self.delivered = Delivered(0.0)

    def __len__(self) -> int:
        """Return the number of steps in one epoch."""
        return len(self._private)

    def __iter__(self) -> Iterator[Any]:
        """Yield a batch for each step."""
        private: Iterator[Any] | None = None
        for _ in range(len(self)):
            weight = self._weight()
            if weight == 1:
                self.delivered = Delivered(weight)
                yield next(self._public)
                continue
            if private is None:
                self._before_private()
                private = iter(self._private)
            batch = next(private)
            self.delivered = Delivered(weight, next(self._public) if weight > 0 else None)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: draws are independent, and the stream is kept by the callback that brought it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""


def check_public(loader: object, private: Dataset[Any]) -> DataLoader[Any]:
    """Return a public dataloader, if nothing shows that it has examples of the private data.

    Args:
        loader: What the user says is public.
        private: The dataset that is trained on privately.

    Raises:
        PrivacyConfigurationError: If it is no dataloader, or has examples that the guarantee is about.
    """
    if not isinstance(loader, DataLoader):
        raise PrivacyConfigurationError(
            f"the public dataloader is a {type(loader).__name__}: expected a torch.utils.data.DataLoader with batches "
            "like those of the train dataloader."
        )
    if holds_private(loader.dataset):
        raise PrivacyConfigurationError(
            f"the public dataset ({type(loader.dataset).__name__}) is or holds a PrivateDataset: public examples are "
            "used without clipping and noise. Give data that may be known to everybody."
        )
    (base, indices), (other, others) = _resolved(loader.dataset), _resolved(private)
    if base is other:
        common = indices & others if indices is not None and others is not None else {0}
        if common:
            raise PrivacyConfigurationError(
                f"the public data has examples of the private training data ({type(base).__name__}"
                f"{f', {len(common)} of them' if indices is not None and others is not None else ''}): they would be "
                "used without clipping and noise. Give two parts that have none in common, such as by random_split."
            )
    return loader


def _resolved(dataset: Any) -> tuple[Any, set[int] | None]:
    """Return what a dataset is a part of, and which examples it has; ``None``: all."""
    indices: list[int] | None = None
    while isinstance(dataset, Subset | PrivateDataset):
        if isinstance(dataset, Subset):
            chosen = [int(i) for i in dataset.indices]
            indices = chosen if indices is None else [chosen[i] for i in indices]
        dataset = dataset.dataset
    return dataset, None if indices is None else {i % len(dataset) for i in indices}
