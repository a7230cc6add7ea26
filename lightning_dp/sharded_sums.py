"""Clipped sums under FSDP2: each process holds its shards of the sums of all processes.

Owns: how much of whole sums is held at a time. Does not own: the reduction itself (``shards``).

Each shard is in one process only, so its noise comes from that one: independent, of the whole standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dp.bookkeeping import Book
from lightning_dp.processes import Processes
from lightning_dp.shards import ShardOf, add_up
from lightning_dp.sums import Sums

_BUCKET = 2**21
"""Elements that are added up at once, so long as one parameter has no more."""


class ShardedSums(Sums):
    """Adds the sums of all processes up after each physical batch, and keeps this process's shards of them.

    Whole sums are made of a few parameters at a time, while the entries of the book that they were made of are let go.
    All processes must pour as often, and with the same names.

    Args:
        shards: The trained parameters, by name.
        processes: Share out the samples.
    """

    def __init__(self, shards: Mapping[str, ShardOf], processes: Processes) -> None:
        super().__init__({}, processes)
        self._shards = dict(shards)

    @property
    def noise_share(self) -> float:
        """All of it."""
        return 1.0

    def pour(self, book: Book, weight: Tensor, names: Iterable[str]) -> None:
        """Add them up, shard by shard."""
        for bucket in self._buckets(names):
            wholes: dict[str, Tensor] = {}
            book.pour(weight, wholes, bucket)
            every = {name: wholes.pop(name) if name in wholes else self._shards[name].zeros() for name in bucket}
            for name, shard in add_up(every, self._shards).items():
                self._sums[name] = self._sums[name].add_(shard) if name in self._sums else shard

    def write(self, noisy: Mapping[str, Tensor], what: str) -> None:
        """Write the gradients as shards."""
        self._processes.add_up([], what)
        for name, gradient in noisy.items():
            self._shards[name].write(gradient)

    def _buckets(self, names: Iterable[str]) -> Iterator[Sequence[str]]:
        """Yield parameters of one type that are added up at once, the same in all processes."""
        bucket: list[str] = []
        for name in names:
            shard = self._shards[name]
            full = sum(self._shards[other].numel for other in bucket) + shard.numel > _BUCKET
            if bucket and (full or self._shards[bucket[0]].dtype != shard.dtype):
                yield bucket
                bucket = []
            bucket.append(name)
        if bucket:
            yield bucket

    def _take(self, name: str) -> Tensor:
        found = self._sums.pop(name, None)
        return self._shards[name].share(self._shards[name].zeros()) if found is None else found


def sums_of(parameters: Mapping[str, nn.Parameter], processes: Processes) -> Sums:
    """Return what sums the gradients of these parameters: in shards, if that is how the parameters are held."""
    if not any(isinstance(p, DTensor) for p in parameters.values()):
        return Sums(parameters, processes)
    return ShardedSums({name: ShardOf(name, p) for name, p in parameters.items()}, processes)
