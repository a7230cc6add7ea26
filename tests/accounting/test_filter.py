"""The filter: an upper bound at one order, and a true one for a run that follows its results."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad
from scipy.stats import norm

from lightning_dp.accounting import (
    Phase,
    RDPAccountant,
    RDPFilter,
    calibrate_noise_multiplier,
    max_steps,
    resolve_accountant,
)
from lightning_dp.accounting.rdp import ORDERS
from lightning_dp.errors import PrivacyConfigurationError

from . import oracles


@pytest.mark.parametrize("order", [2, 7.75, 18.0, 64])
def test_like_dp_accounting_at_one_order(order):
    for rate, noise, count, delta, *_ in oracles.GOLDEN:
        theirs = RdpAccountant(orders=[order])
        event = dp_accounting.GaussianDpEvent(noise)
        theirs.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), count)
        ours = RDPFilter(float(ORDERS[np.argmin(np.abs(ORDERS - order))])).epsilon([Phase(noise, rate, count)], delta)
        assert ours == pytest.approx(float(theirs.get_epsilon(delta)), rel=1e-5)


def test_never_below_the_truth_or_the_best_order():
    for rate, noise, count, delta in oracles.random_settings(6, seed=5):
        phases = [Phase(noise, rate, count)]
        ours = RDPFilter().for_target(3.0, delta).epsilon(phases, delta)
        assert ours >= RDPAccountant().epsilon(phases, delta)
        assert ours >= oracles.pld_epsilon([(rate, noise, count)], delta) * (1 - 1e-4)


@pytest.mark.parametrize(("target", "delta"), [(0.01, 1e-5), (1.0, 1e-6), (3.0, 1e-5), (100.0, 1e-5)])
def test_order_for_a_target(target, delta):
    """The order at which most Gaussian divergence fits, by a search that knows the formulas alone."""
    order = RDPFilter().for_target(target, delta).order

    def room(a: float) -> float:
        return (target - math.log1p(-1 / a) + (math.log(delta) + math.log(a)) / (a - 1)) / a

    best = max(room(a) for a in np.geomspace(1.001, 30_000, 20_000))
    assert room(order) >= 0.97 * best
    # The order of the simple conversion is known in closed form; the tighter conversion wants a smaller one.
    log = math.log(1 / delta)
    assert order <= 1.05 * (1 + (log + math.sqrt(log * (target + log))) / target)


def gaussian_hockey_stick(mu: float, epsilon: float) -> float:
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize("greedy_after_high_loss", [True, False])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 2.0])
def test_a_run_that_follows_its_results(threshold, greedy_after_high_loss):
    """Two full-batch releases: the second has all noise that the filter allows, or is not made, as the first came out.

    Delta at the target is an integral over the first result of the Gaussian mechanism's delta of the second.
    """
    target, delta, first = 2.0, 1e-3, 3.0
    chosen = RDPFilter().for_target(target, delta)

    def fits(noise: float) -> bool:
        return chosen.epsilon([Phase(first, 1.0, 1), Phase(noise, 1.0, 1)], delta) <= target

    second = next(noise for noise in np.geomspace(0.5, 20, 500) if fits(noise))

    def integrand(x: float) -> float:
        loss = (2 * x - 1) / (2 * first**2)
        if (x > threshold) is greedy_after_high_loss:
            left = gaussian_hockey_stick(1 / second, target - loss)
        else:
            left = max(0.0, 1 - math.exp(target - loss))
        return float(norm.pdf(x, 1, first)) * left

    true_delta = sum(quad(integrand, a, b, limit=200)[0] for a, b in [(-12, threshold), (threshold, 15)])
    assert 0 < true_delta <= delta


def test_calibration_and_steps_hold_the_target():
    chosen = RDPFilter().for_target(3.0, 1e-5)
    noise = calibrate_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, num_steps=10_000, accountant=chosen
    )
    assert 0.995 * 3 <= chosen.epsilon([Phase(noise, 0.01, 10_000)], 1e-5) <= 3
    assert oracles.pld_epsilon([(0.01, noise, 10_000)], 1e-5) <= 3
    arguments = {"target_epsilon": 3.0, "target_delta": 1e-5, "noise_multiplier": noise, "sample_rate": 0.01}
    steps = max_steps(**arguments, accountant=chosen)
    # One order, known beforehand, costs little where many small releases look like one large Gaussian.
    assert 10_000 <= steps <= max_steps(**arguments, accountant="rdp") <= 1.01 * steps


def test_for_a_plan_nothing_is_lost():
    plan = [Phase(0.75, 0.001, 10_000), Phase(2.0, 0.01, 100)]
    chosen = RDPFilter.for_plan(plan, 1e-5)
    assert chosen.epsilon(plan, 1e-5) == pytest.approx(RDPAccountant().epsilon(plan, 1e-5), rel=1e-12)
    assert RDPFilter().for_target(3.0, 1e-5).epsilon(plan, 1e-5) > 1.05 * chosen.epsilon(plan, 1e-5)
    assert chosen.for_target(3.0, 1e-5).order == chosen.order


def test_total_variation_is_no_way_out():
    """A release too rare to matter costs nothing by itself, but uses up what a filter watches."""
    phases = [Phase(0.5, 1e-7, 10)]
    assert RDPAccountant().epsilon(phases, 1e-5) == 0
    assert RDPFilter(2.0).epsilon(phases, 1e-5) > 0


@pytest.mark.parametrize("phases", [[], [Phase(0.0, 0.1, 1)], [Phase(1.0, 0.1, 0)]])
def test_bad_plan(phases):
    with pytest.raises(PrivacyConfigurationError, match="phases=.*expected releases, all with noise"):
        RDPFilter.for_plan(phases, 1e-5)


def test_no_order_yet():
    with pytest.raises(PrivacyConfigurationError, match=r"has no order yet.*Give target_epsilon"):
        resolve_accountant("rdp_filter").epsilon([Phase(1.0, 0.1, 1)], 1e-5)


@pytest.mark.parametrize("order", [1, 0, -3, math.nan, math.inf, "3", True, 3.14159, np.bool_(True)])
def test_bad_order(order):
    with pytest.raises(PrivacyConfigurationError, match=r"order=.*expected .*rdp\.ORDERS"):
        RDPFilter(order)


def test_numpy_orders():
    assert RDPFilter(np.int64(3)).order == RDPFilter(np.float64(3)).order == 3.0
