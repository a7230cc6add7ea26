"""What privacy costs in time: two ways to do the same, measured in turns.

The least of many times is compared, not the median: where other processes take cores away, threads wait for each other
and a pass of milliseconds takes ten times as long now and then. In runs on such a machine the ratio of the medians was
anything from 0.5 to 7, that of the least times 1.7 to 2.3.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_dp.bookkeeping.noting import now

_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 200, 2.0


def time_ratio(one: Callable[[], None], other: Callable[[], None]) -> float:
    """Return the least time of ``one`` over that of ``other``; a first run of each does not count."""
    seconds_of(one), seconds_of(other)
    seconds: tuple[list[float], list[float]] = [], []
    while len(seconds[0]) < _MIN_ROUNDS or (len(seconds[0]) < _MAX_ROUNDS and sum(map(sum, seconds)) < _ENOUGH_SECONDS):
        seconds[0].append(seconds_of(one))
        seconds[1].append(seconds_of(other))
    return min(seconds[0]) / min(seconds[1])


def seconds_of(action: Callable[[], None]) -> float:
    """Return how long an action takes."""
    began = now()
    action()
    return now() - began
