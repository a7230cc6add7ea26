"""The table a progress bar reads."""

import math

import pytest

from lightning_dp.accounting import EpsilonTable, Phase, PRVAccountant, epsilon_curve
from lightning_dp.errors import PrivacyConfigurationError

from . import oracles


def curve(num_steps, **changes):
    arguments = {"delta": 1e-5, "knots": 8} | changes
    return epsilon_curve(
        PRVAccountant(), lambda n: [[Phase(1.2, 0.02, 500), Phase(1.0, 0.01, n)]], num_steps=num_steps, **arguments
    )


def test_curve_after_a_history():
    steps, epsilons = curve(1000)
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert sorted(set(steps)) == list(steps)
    assert epsilons[-1] == pytest.approx(2.6878, rel=0.006)
    table = EpsilonTable(steps, epsilons)
    for count in (0, 1, 77, 500):
        assert table.at(count) >= oracles.pld_epsilon([(0.02, 1.2, 500), (0.01, 1.0, count)][: 1 + (count > 0)], 1e-5)


def test_table_gives_the_next_knot():
    table = EpsilonTable([0, 1, 10], [0.0, 0.5, 2.0])
    assert [table.at(n) for n in (0, 1, 2, 10, 11)] == [0.0, 0.5, 2.0, 2.0, math.inf]


def test_empty_curve():
    assert curve(0)[0] == (0,)


def test_bad_lengths():
    with pytest.raises(PrivacyConfigurationError, match="num_steps=-1"):
        curve(-1)
    with pytest.raises(PrivacyConfigurationError, match="knots=-1"):
        curve(5, knots=-1)
