"""The arithmetic of medians and ratios, against NumPy's."""

import numpy as np
import pytest

from lightning_dp.benchmarking.baton import Step
from lightning_dp.benchmarking.result import Row, ratio_of, ratios_of
from tests.benchmarking.made_up import row


def test_a_ratio_is_of_steps_side_by_side():
    """A drift that both have cancels: what takes twice as long in every round is twice as slow, exactly."""
    drift = [1.0, 10.0, 3.0, 0.5, 7.0]
    found = ratio_of(row("slow", [2 * d for d in drift]), row("fast", drift))
    assert (found.name, found.other) == ("slow", "fast")
    assert found.low == found.time == found.high == pytest.approx(2.0)


@pytest.mark.parametrize("rounds", [1, 2, 5, 8])
def test_median_and_quartiles_are_those_of_numpy(rounds):
    g = np.random.default_rng(rounds)
    a, b = g.uniform(1, 2, rounds), g.uniform(1, 2, rounds)
    m, n = g.integers(1, 50, rounds), g.integers(1, 50, rounds)
    one, other = row("one", a.tolist(), m.tolist()), row("other", b.tolist(), n.tolist())
    found = ratio_of(one, other)
    expected = np.percentile((a / m) / (b / n), [25, 50, 75])
    np.testing.assert_allclose([found.low, found.time, found.high], expected)
    assert one.seconds_per_step == pytest.approx(np.median(a))
    assert one.seconds_per_example == pytest.approx(np.median(a / m))
    assert one.seconds_per_batch == pytest.approx(4 * np.median(a / m))


def test_an_empty_draw_has_a_time_too():
    assert Step(3.0, 1, 0).seconds_per_example == 3.0


def test_memory_is_compared_above_the_level_before_the_model():
    assert ratio_of(row("a", [1.0], peak=500, level=100), row("b", [1.0], peak=250, level=50)).memory == 2.0
    assert ratio_of(row("a", [1.0]), row("b", [1.0], peak=100, level=100)).memory is None
    unknown = Row("b", row("b", [1.0]).facts, row("b", [1.0]).steps, None)
    assert ratio_of(row("a", [1.0]), unknown).memory is None


def test_what_was_not_measured_is_not_compared():
    absent = Row("absent", None, (), None, "out of memory")
    rows = [row("a", [1.0]), row("b", [2.0]), absent]
    assert ratio_of(rows[0], absent) is None
    pairs = [("b", "a"), ("absent", "a"), ("a", "absent"), ("a", "never started")]
    assert [(r.name, r.other, r.time) for r in ratios_of(rows, pairs)] == [("b", "a", 2.0)]
