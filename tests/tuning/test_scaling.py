"""The line and the division of r, against numpy and by what must hold of every value."""

import math
import random

import numpy as np
import pytest
from scipy.stats import kstest

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.tuning import Line, SearchSpace, Setting

SPACE = SearchSpace(lr=(0.05, 2.0), num_steps=(10, 100))


def test_through_two_points_it_is_the_line_of_the_paper():
    line = Line.through([(0.05, 1.5), (0.1, 2.5)])
    assert line(0.05) == pytest.approx(1.5)
    assert line(0.1) == pytest.approx(2.5)
    assert line(0.96) == pytest.approx(1.5 + (0.96 - 0.05) * 20)


def test_through_more_points_it_is_that_of_least_squares():
    points = [(0.05, 1.5), (0.1, 2.9), (0.2, 4.0), (0.4, 9.5)]
    slope, intercept = np.polyfit(*zip(*points, strict=True), 1)
    assert Line.through(points) == Line(pytest.approx(slope), pytest.approx(intercept))


@pytest.mark.parametrize("points", [[(0.05, 4.0), (0.1, 3.0)], [(0.1, 3.0), (0.05, 4.0)]])
def test_a_falling_line_keeps_the_value_of_the_largest_epsilon(points):
    assert [Line.through(points)(epsilon) for epsilon in (0.05, 0.96)] == [3.0, 3.0]


@pytest.mark.parametrize("points", [[], [(0.1, 1.0)], [(0.1, 1.0), (0.1, 2.0)]])
def test_no_line_without_two_epsilons(points):
    with pytest.raises(PrivacyConfigurationError, match="expected at least two different epsilons"):
        Line.through(points)


@pytest.mark.parametrize("r", [0.51, 1.0, 7.3, 50.0, 199.0])
def test_r_is_divided_without_a_remainder_and_within_the_space(r):
    setting = SPACE.divided(r)
    assert setting.lr * setting.num_steps == pytest.approx(r, rel=1e-12)
    assert 0.05 <= setting.lr <= 2.0
    assert 10 <= setting.num_steps <= 100
    up = math.log(setting.lr / 0.05) / math.log(40), math.log(setting.num_steps / 10) / math.log(10)
    assert up[0] == pytest.approx(up[1], abs=0.02)  # as far as a whole number of steps allows


@pytest.mark.parametrize(("r", "edge"), [(-3.0, (0.05, 10)), (0.0, (0.05, 10)), (0.4, (0.05, 10)), (1e9, (2.0, 100))])
def test_beyond_the_space_its_edge_is_taken(r, edge):
    assert SPACE.divided(r) == Setting(*edge)


def test_a_space_of_one_setting_has_only_that():
    space = SearchSpace(lr=(0.3, 0.3), num_steps=(20, 20))
    assert space.divided(0.1) == space.divided(6.0) == space.divided(99) == Setting(0.3, 20)
    drawn = space.draw(random.Random(0))
    assert drawn == Setting(pytest.approx(0.3), 20)


def test_draws_are_uniform_in_logarithms():
    rng = random.Random(3)
    drawn = [SPACE.draw(rng) for _ in range(2000)]
    lrs = [math.log(one.lr / 0.05) / math.log(40) for one in drawn]
    assert kstest(lrs, "uniform").pvalue > 0.01
    assert kstest([x**2 for x in lrs], "uniform").pvalue < 1e-6  # it would notice
    assert {min(one.num_steps for one in drawn), max(one.num_steps for one in drawn)} == {10, 100}
    assert np.median([one.num_steps for one in drawn]) == pytest.approx(math.sqrt(1000), abs=2.5)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"lr": (0.0, 1.0)}, r"lr=\(0.0, 1.0\) to search in"),
        ({"lr": (2.0, 1.0)}, "expected two numbers, 0 < least <= largest"),
        ({"lr": (1.0,)}, "expected two numbers"),
        ({"num_steps": (10, math.inf)}, "num_steps="),
        ({"num_steps": (10.5, 20.5)}, "num_steps=10.5: expected an integer"),
    ],
)
def test_what_is_no_range_is_refused(ranges, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        SearchSpace(**ranges)
