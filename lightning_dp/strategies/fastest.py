"""The search for the physical batch size that takes the least time for each sample, within the memory there is.

Owns: which sizes are tried, how often, and when the search ends. Does not own: how long a batch takes and what it needs
(``measuring``), or how much memory there is (``memory``).

Larger is not always faster. Small batches pay for what every batch costs, but for long sequences a batch of one or two
already keeps the device busy, and the per-sample gradients of few samples are cheap to keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from lightning_dp.strategies.memory import OutOfMemory, shown

_GAIN = 0.03
"""A size counts as faster if it saves at least this share of the time."""

_PATIENCE = 2
"""After so many sizes in a row that are not faster the search ends."""

_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 10, 0.5
_CLEARLY_FASTER = 0.3
"""A share of the time; when so much is saved two rounds are enough: what runs for the first time only takes longer."""

_FEWEST_SAMPLES = 4


class Bench(Protocol):
    """Where physical batches are tried; every method raises `OutOfMemory` where one does not fit."""

    def room(self) -> float:
        """Return how many bytes a physical batch may need."""

    def weigh(self, size: int) -> float:
        """Return how many bytes a physical batch of ``size`` samples needs."""

    def time(self, size: int, count: int) -> float:
        """Return the seconds of one sample, where ``count`` samples, always the same, come in batches of ``size``."""


@dataclass(frozen=True)
class Choice:
    """A physical batch size, and why it is this one.

    Args:
        size: How many units a physical batch has at most.
        beyond: What is known of a larger one.
        seconds: For each unit; ``None`` if there was nothing to compare.
        num_bytes: What such a batch needs; ``None`` likewise.
    """

    size: int
    beyond: str
    seconds: float | None = None
    num_bytes: float | None = None

    def sentence(self, unit: str = "sample") -> str:
        """Return all of it in words."""
        begun = f"Physical batches of {self.size:,} {unit}{'s' if self.size > 1 else ''}"
        if self.seconds is None or self.num_bytes is None:
            return f"{begun}: {self.beyond}."
        return f"{begun}: {_time(self.seconds)} per {unit}, {shown(self.num_bytes)}; {self.beyond}."


def fastest(bench: Bench, most: int) -> Choice:
    """Return the size with the least time for each sample: 1, 2, 4, 8 and so on, or ``most``.

    A size is tried only if the memory that it is expected to need is there: what the two before it needed, continued in
    a straight line. Of sizes that differ by less than 3 % the smallest is chosen, and the search ends after two in a
    row that are no faster. Neighbours are timed in turns, and the least times are compared: other work on the machine
    only ever adds to a time.

    Args:
        bench: Where they are tried.
        most: The largest size that is of any use.
    """
    if most == 1:
        return Choice(1, "no logical batch is larger")
    try:
        search = _Search(bench, bench.room())
        search.weights[1] = bench.weigh(1)
    except OutOfMemory:
        return Choice(1, "even one ran out of memory when it was tried")
    return search.run(_sizes(most))


class _Search:
    """What is known of every size that was tried."""

    def __init__(self, bench: Bench, room: float) -> None:
        self._bench, self._room = bench, room
        self.weights: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._shares: dict[int, float] = {1: 1.0}
        self._obstacles: dict[int, str] = {}

    def run(self, sizes: list[int]) -> Choice:
        """Try one size after the other, each against the one before; the first was weighed."""
        best, in_vain = sizes[0], 0
        for before, size in zip(sizes, sizes[1:], strict=False):
            if in_vain == _PATIENCE or not self._is_possible(before, size):
                break
            faster = self._shares[size] < (1 - _GAIN) * self._shares[best]
            best, in_vain = (size, 0) if faster else (best, in_vain + 1)
        following = next((size for size in sizes if size > best), None)
        return Choice(best, self._beyond(best, following), self._seconds.get(best), self.weights[best])

    def _is_possible(self, before: int, size: int) -> bool:
        """Weigh and time a size; note why that cannot be, if so."""
        expected = self._expected(size)
        try:
            if expected <= self._room:
                expected = self.weights[size] = self._bench.weigh(size)
            if expected > self._room:
                self._obstacles[size] = f"{size:,} would need {shown(expected)}, and {shown(self._room)} may be used"
                return False
            self._compare(before, size)
        except OutOfMemory:
            self._obstacles[size] = f"{size:,} ran out of memory when it was tried"
            return False
        return True

    def _expected(self, size: int) -> float:
        """Return the memory that a size is expected to need, from that of the two before it."""
        (one, other) = ([(0, 0.0), *self.weights.items()])[-2:]
        slope = (other[1] - one[1]) / (other[0] - one[0])
        return other[1] + max(slope, 0.0) * (size - other[0])

    def _compare(self, before: int, size: int) -> None:
        """Time a size against the one before, in turns and on the same samples."""
        count = size * math.ceil(_FEWEST_SAMPLES / size)
        least = {before: math.inf, size: math.inf}
        rounds, spent = 0, 0.0
        while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and spent < _ENOUGH_SECONDS):
            for each in least:
                seconds = self._bench.time(each, count)
                least[each], spent = min(least[each], seconds), spent + seconds * count
            rounds += 1
            if rounds > 1 and least[size] < (1 - _CLEARLY_FASTER) * least[before]:
                break
        self._shares[size] = self._shares[before] * least[size] / least[before]
        self._seconds |= least

    def _beyond(self, best: int, following: int | None) -> str:
        if following is None:
            return "no logical batch is larger"
        if following in self._obstacles:
            return self._obstacles[following]
        change = self._shares[following] / self._shares[best] - 1
        if abs(change) < 0.005:
            return f"{following:,} would be no faster"
        only = "" if change > 0 else "only "
        return f"{following:,} would be {only}{100 * abs(change):.0f} % {'slower' if change > 0 else 'faster'}"


def _sizes(most: int) -> list[int]:
    return [*(2**k for k in range((most - 1).bit_length())), most]


def _time(seconds: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"
