"""Groups of examples against integrals that are written down here."""

import math

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import binom, norm

from lightning_dp.accounting import Phase, resolve_accountant
from lightning_dp.reporting import groups, numbers
from lightning_dp.reporting.groups import GROUP, MIXTURE, group_epsilon, group_privacy

DELTA = 1e-3


def mixture_delta(epsilon, rate, noise, k):
    """Delta of one release for k examples more or less: the hockey-stick divergence, both ways, on a grid."""
    x = np.linspace(-12 * noise, k + 12 * noise, 200_001)
    with_k = sum(binom.pmf(i, k, rate) * norm.pdf(x, i, noise) for i in range(k + 1))
    without = norm.pdf(x, 0, noise)
    both = (with_k, without), (without, with_k)
    return max(trapezoid(np.maximum(0, p - math.exp(epsilon) * q), x) for p, q in both)


@pytest.mark.parametrize(("rate", "noise", "k"), [(0.3, 1.5, 2), (0.05, 1.0, 4), (1.0, 4.0, 2)])
def test_one_release_is_exact(rate, noise, k):
    epsilon = numbers.pld_epsilon((Phase(noise, rate, 1),), DELTA, k)
    assert mixture_delta(epsilon, rate, noise, k) <= DELTA * (1 + 1e-6)
    assert mixture_delta(0.98 * epsilon, rate, noise, k) > DELTA


def test_one_example_is_no_group():
    phases = (Phase(1.0, 0.1, 50),)
    assert numbers.pld_epsilon(phases, DELTA) == pytest.approx(
        resolve_accountant("prv").epsilon(phases, DELTA), rel=0.01
    )


@pytest.mark.parametrize(("noise", "rate", "count"), [(4.0, 0.01, 1000), (8.0, 0.05, 100)])
def test_the_simple_bound_lies_above_the_mixture(noise, rate, count):
    phases = (Phase(noise, rate, count),)
    exact = {group.num_examples: group for group in group_privacy(phases, 1e-5)}
    assert {group.method for group in exact.values()} == {MIXTURE}
    one = resolve_accountant("rdp").epsilon(phases, 1e-5)
    for k, group in exact.items():
        simple = group_epsilon(phases, 1e-5, k)
        assert simple > group.epsilon > k * one / 2
        # The theorem, once more: some delta of one example has this epsilon, and what k make of it is the group's.
        share = 1e-5 * math.expm1(simple / k) / math.expm1(simple)
        assert resolve_accountant("rdp").epsilon(phases, share) == pytest.approx(simple / k, rel=1e-4)


def test_without_dp_accounting_the_simple_bound_is_given(monkeypatch):
    monkeypatch.setattr(numbers, "_module", lambda: None)
    phases = (Phase(4.0, 0.01, 1000),)
    assert numbers.library() is None
    assert "pip install 'lightning-dp[pld]'" in numbers.reason_against(phases)
    found = group_privacy(phases, 1e-5)
    assert [group.method for group in found] == [GROUP] * len(groups.SIZES)
    assert [group.epsilon for group in found] == [group_epsilon(phases, 1e-5, k) for k in groups.SIZES]


def test_what_is_too_much_for_the_second_accountant():
    many = [Phase(1.0 + k / 100, 0.1, 1) for k in range(numbers.MOST_KINDS + 1)]
    assert numbers.reason_against(many[:-1]) is None
    assert numbers.reason_against(many) == f"{len(many)} kinds of release: more than {numbers.MOST_KINDS} take too long"
    assert "noise multiplier 0.05" in numbers.reason_against([Phase(0.05, 0.1, 1)])


def test_no_useful_bound():
    assert group_epsilon((Phase(0.05, 1.0, 100),), 1e-5, 8) is None
    assert group_privacy((Phase(0.0, 0.1, 3),), 1e-5) == group_privacy((), 1e-5) == ()
