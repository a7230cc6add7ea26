"""What privacy costs in time: two ways to do the same, measured in turns, so that a busy machine slows both."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from lightning_dp.bookkeeping.noting import now

_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 30, 2.0


def time_ratio(one: Callable[[], None], other: Callable[[], None]) -> float:
    """Return the median time of ``one`` over that of ``other``; a first run of each does not count."""
    seconds = seconds_of(one), seconds_of(other)
    measured: tuple[list[float], list[float]] = [], []
    while len(measured[0]) < _MIN_ROUNDS or (
        len(measured[0]) < _MAX_ROUNDS and sum(map(sum, measured)) + sum(seconds) < _ENOUGH_SECONDS
    ):
        seconds = seconds_of(one), seconds_of(other)
        for column, value in zip(measured, seconds, strict=True):
            column.append(value)
    return median(measured[0]) / median(measured[1])


def seconds_of(action: Callable[[], None]) -> float:
    """Return how long an action takes."""
    began = now()
    action()
    return now() - began
