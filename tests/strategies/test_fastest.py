"""The search for the fastest size on made-up costs: it finds the least of all, and tries nothing that is too large."""

import math

import pytest

from lightning_dp.strategies import fastest as module
from lightning_dp.strategies.fastest import fastest
from lightning_dp.strategies.memory import OutOfMemory


class MadeUp:
    """Costs by formula, with a note of what was asked for.

    ``too_large`` is the first size that does not fit although it was expected to.
    """

    def __init__(self, seconds, need=lambda size: 0.0, room=math.inf, too_large=math.inf, noise=lambda call: 1.0):
        self.seconds, self.need, self.available, self.too_large = seconds, need, room, too_large
        self.noise, self.weighed, self.timed = noise, [], []

    def room(self):
        self.fits(1)
        return self.available

    def weigh(self, size):
        self.fits(size)
        self.weighed.append(size)
        return self.need(size)

    def time(self, size, count):
        self.fits(size)
        self.timed.append((size, count))
        return self.seconds(size) * self.noise(len(self.timed))

    def fits(self, size):
        if size >= self.too_large:
            raise OutOfMemory


def u_shaped(best):
    return lambda size: 1.0 + abs(math.log2(size / best))


@pytest.mark.parametrize("best", [1, 2, 4, 16, 64])
def test_the_bottom_of_a_u(best):
    bench = MadeUp(u_shaped(best))
    choice = fastest(bench, 64)
    assert choice.size == best == min((2**k for k in range(7)), key=bench.seconds)
    assert choice.seconds == bench.seconds(best) == 1.0
    assert max(bench.weighed) == min(4 * best, 64)


@pytest.mark.parametrize("most", [1, 2, 3, 11, 64, 100])
def test_times_that_only_fall_lead_to_the_largest_useful_size(most):
    bench = MadeUp(lambda size: 1 / size)
    choice = fastest(bench, most)
    assert choice.size == most
    assert choice.beyond == "no logical batch is larger"
    powers = [2**k for k in range(8) if 2**k < most]
    assert bench.weighed == ([*powers, most] if most > 1 else [])


def test_times_that_are_all_alike_lead_to_the_smallest():
    bench = MadeUp(lambda size: 0.021, need=lambda size: 1.3e9)
    choice = fastest(bench, 64)
    assert (choice.size, bench.weighed) == (1, [1, 2, 4])
    assert choice.sentence() == "Physical batches of 1 sample: 21 ms per sample, 1.3 GB; 2 would be no faster."


def test_a_gain_that_is_too_small_twice_ends_the_search_and_a_larger_one_later_does_not_count():
    times = {1: 1.0, 2: 0.98, 4: 0.975, 8: 0.1}
    assert fastest(MadeUp(times.__getitem__), 8).size == 1


def test_a_gain_after_one_size_in_vain_counts():
    times = {1: 1.0, 2: 0.5, 4: 0.51, 8: 0.4, 16: 0.42, 32: 0.43, 64: 0.1}
    bench = MadeUp(times.__getitem__)
    choice = fastest(bench, 64)
    assert (choice.size, max(bench.weighed)) == (8, 32)
    assert choice.beyond == "16 would be 5 % slower"


def test_small_gains_add_up():
    bench = MadeUp(lambda size: 0.98 ** math.log2(size))
    assert fastest(bench, 1024).size >= 256


@pytest.mark.parametrize(("room", "expected"), [(11, 1), (21, 1), (22, 8), (25, 8), (26, 16), (73, 32), (74, 64)])
def test_never_more_memory_than_there_is(room, expected):
    # Of one size alone it is not known what is there only once: two are expected to need 22.
    bench = MadeUp(lambda size: 1 / size, need=lambda size: 10 + size, room=room)
    choice = fastest(bench, 64)
    assert choice.size == max(bench.weighed) == expected
    assert all(bench.need(size) <= room for size in bench.weighed)


@pytest.mark.parametrize(("room", "expected"), [(2, 2), (3.9, 2), (4, 4), (31.9, 16), (32, 32)])
def test_what_a_size_needs_is_foreseen_by_a_straight_line(room, expected):
    bench = MadeUp(lambda size: 1 / size, need=lambda size: float(size), room=room)
    choice = fastest(bench, 64)
    assert choice.size == max(bench.weighed) == expected == max(2**k for k in range(7) if 2**k <= room)
    assert choice.num_bytes == expected
    assert choice.beyond == f"{2 * expected} would need under 1 MB, and under 1 MB may be used"


def test_a_need_that_grows_faster_than_foreseen_is_refused_when_it_is_seen():
    bench = MadeUp(lambda size: 1 / size, need=lambda size: 1e9 * size**2, room=15e9)
    choice = fastest(bench, 64)
    assert (choice.size, bench.weighed) == (2, [1, 2, 4])
    assert choice.sentence() == (
        "Physical batches of 2 samples: 500 ms per sample, 4 GB; 4 would need 16 GB, and 15 GB may be used."
    )


@pytest.mark.parametrize("too_large", [2, 8, 64])
def test_a_size_that_runs_out_of_memory_ends_the_search(too_large):
    bench = MadeUp(lambda size: 1 / size, too_large=too_large)
    choice = fastest(bench, 64)
    assert choice.size == too_large // 2
    assert choice.beyond == f"{too_large} ran out of memory when it was tried"


def test_one_sample_is_too_large():
    choice = fastest(MadeUp(lambda size: 1.0, too_large=1), 64)
    assert choice.size == 1
    assert choice.sentence() == "Physical batches of 1 sample: even one ran out of memory when it was tried."


def test_neighbours_are_timed_in_turns_on_the_same_samples():
    bench = MadeUp(u_shaped(4))
    fastest(bench, 16)
    for first, second in zip(bench.timed[::2], bench.timed[1::2], strict=True):
        assert second[0] == 2 * first[0]
        assert first[1] == second[1] >= 4
        assert first[1] % second[0] == 0
    assert {pair[0] for pair in bench.timed} == {1, 2, 4, 8, 16}


def test_times_of_a_busy_machine(monkeypatch):
    """Now and then everything takes ten times as long: the least times of many count."""
    monkeypatch.setattr(module, "_ENOUGH_SECONDS", math.inf)
    bench = MadeUp(u_shaped(8), noise=lambda call: 10.0 if call % 3 == 0 else 1.0)
    assert fastest(bench, 64).size == 8


@pytest.mark.parametrize(
    ("seconds", "expected"), [(2.5, "2.5 s per user"), (0.0213, "21.3 ms per user"), (4e-5, "40 us per user")]
)
def test_the_sentence_names_the_unit(seconds, expected):
    choice = fastest(MadeUp(lambda size: seconds * (1 + (size > 1)), need=lambda size: 2.5e6), 2)
    assert choice.sentence("user") == f"Physical batches of 1 user: {expected}, 2.5 MB; 2 would be 100 % slower."
