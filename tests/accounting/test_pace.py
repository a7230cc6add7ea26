"""How many releases are reserved at once: against a clock, a disk and steps of our own making."""

import pytest

from lightning_dp.accounting import reservation
from lightning_dp.accounting.reservation import Pace


class Clock:
    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


def simulated(monkeypatch, steps, step, write):
    """The blocks of a run, and the share of its time that went into writing."""
    clock, pace, blocks, made, writing = Clock(), Pace(), [], 0, 0.0
    monkeypatch.setattr(reservation, "time", clock)
    start = clock.now
    while made < steps:
        blocks.append(pace.block(made))
        clock.now += write
        writing += write
        pace.wrote(made, write)
        clock.now += step * blocks[-1]
        made += blocks[-1]
    return blocks, writing / (clock.now - start)


@pytest.mark.parametrize("step", [0.001, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("write", [0.0001, 0.001, 0.009])
def test_writing_takes_a_thousandth_and_no_more_is_reserved_than_that_needs(monkeypatch, step, write):
    """A slow disk may take more, rather than that more than two seconds are reserved."""
    blocks, share = simulated(monkeypatch, 100_000, step, write)
    assert share <= 1.2 * max(0.001, write / 2)
    assert max(blocks) <= 1.001 + write / 0.001 / step


def test_a_slow_disk_gets_two_seconds_or_one_per_cent(monkeypatch):
    blocks, _ = simulated(monkeypatch, 100_000, 0.01, 0.5)
    made = 0
    for block in blocks:
        assert block <= max(200, 0.01 * made) + 1
        made += block
    assert blocks[-1] == pytest.approx(0.01 * made, rel=0.05)


def test_the_first_blocks_are_small_whatever_the_first_steps_suggest(monkeypatch):
    blocks, _ = simulated(monkeypatch, 1000, 1e-6, 0.01)
    assert blocks == [2**k for k in range(10)]


def test_the_number_may_be_asked_for_again_without_a_release_in_between():
    pace = Pace()
    assert pace.block(0) == 1
    pace.wrote(0, 0.01)
    assert pace.block(0) == 1
