"""The Renyi accountant, against dp-accounting's Renyi and PLD accountants and a brute-force moment."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting import Phase, RDPAccountant
from lightning_dp.accounting import rdp as module

from . import oracles


def theirs(rate: float, noise: float, count: int, delta: float) -> float:
    accountant = RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("rate", "noise", "count", "delta", "pld", "prv"), oracles.GOLDEN)
def test_golden_values(rate, noise, count, delta, pld, prv):
    assert RDPAccountant().epsilon([Phase(noise, rate, count)], delta) >= pld * (1 - 3e-5)


@pytest.mark.parametrize("row", [row for row in oracles.GOLDEN if row[0] < 1])
def test_like_dp_accounting(row):
    rate, noise, count, delta, *_ = row
    ours = RDPAccountant().epsilon([Phase(noise, rate, count)], delta)
    assert ours == pytest.approx(theirs(rate, noise, count, delta), rel=5e-3)


def test_small_epsilons_need_large_orders():
    ours = RDPAccountant().epsilon([Phase(50.0, 1e-3, 10_000)], 1e-5)
    assert oracles.pld_epsilon([(1e-3, 50.0, 10_000)], 1e-5) <= ours < 0.007


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (0.4, 0.2), (6.0, 1e-3), (0.1, 0.5)])
def test_moments_by_brute_force(noise, rate):
    values = module.divergences(noise, rate)
    for order in (1.0001, 1.55, 2, 3.75, 9.25, 17):
        index = int(np.argmin(np.abs(module.ORDERS - order)))
        order = module.ORDERS[index]
        x, step = np.linspace(-20 * noise, order + 20 * noise, 400_001, retstep=True)
        log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
        log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + math.log(step)
        if order < 2:  # near order 1 the moment is 1 and a hair: sum the hair, exactly
            moment = math.log1p(math.fsum(np.exp(log_density) * np.expm1(order * log_ratio)))
        else:
            top = float((order * log_ratio + log_density).max())
            moment = top + math.log(math.fsum(np.exp(order * log_ratio + log_density - top)))
        # 1e-13 of rounding in the moment, divided by the order less 1, is allowed for.
        assert values[index] == pytest.approx(moment / (order - 1), rel=1e-8, abs=5e-13 / (order - 1))


def test_little_noise_stays_below_the_unsampled_divergence():
    assert (module.divergences(0.01, 0.5) <= module.ORDERS / (2 * 0.01**2)).all()


@pytest.mark.parametrize("adding", [False, True])
def test_loss_tail_bounds_the_loss(adding):
    noise, rate, count = 1.0, 0.05, 20
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100_000, count)) * noise
    if not adding:
        x += rng.random(x.shape) < rate
    loss = np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2))).sum(1) * (-1 if adding else 1)
    for probability in (0.1, 0.01):
        assert np.mean(np.abs(loss) > module.loss_tail([Phase(noise, rate, count)], probability)) <= probability
