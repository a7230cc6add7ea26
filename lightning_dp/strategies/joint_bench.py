"""Trying physical batch sizes on several processes at once.

Owns: what the processes tell each other of a size. Does not own: how one is tried (``measuring``), or the search
(``fastest``).

Every process has as many physical batches of a logical batch as any other, so one size is found for all of them, and
all run the same training steps to find it: collectives of the user's in them meet. The slowest process, and the one
with the least memory, count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_dp.processes import Processes
from lightning_dp.strategies.fastest import Bench
from lightning_dp.strategies.memory import OutOfMemory


class JointBench:
    """The benches of all processes; see ``fastest.Bench``.

    Args:
        bench: Of this process.
        processes: All of them.
        device: Of this process.
    """

    def __init__(self, bench: Bench, processes: Processes, device: torch.device) -> None:
        self._bench, self._processes = bench, processes
        self._sharing = processes.num_here if device.type == "cpu" else 1  # they have one memory

    def room(self) -> float:
        """Return the least of what each process may use."""
        return min(self._everywhere(lambda: self._bench.room() / self._sharing))

    def weigh(self, size: int) -> float:
        """Return the most that a process needs."""
        return max(self._everywhere(lambda: self._bench.weigh(size)))

    def time(self, size: int, count: int) -> float:
        """Return the longest time of one sample."""
        return max(self._everywhere(lambda: self._bench.time(size, count)))

    def _everywhere(self, measure: Callable[[], float]) -> list[float]:
        """Return what all processes measure.

        Raises:
            OutOfMemory: If it did not fit somewhere.
        """
        found = [value for value in self._processes.gather(_or_none(measure)) if value is not None]
        if len(found) < self._processes.size:
            raise OutOfMemory
        return found


def _or_none(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except OutOfMemory:
        return None
