"""What a random search costs, against dp-accounting's repeat-and-select; and how often it runs."""

import itertools
import math
import random

import dp_accounting
import numpy as np
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.stats import chisquare, geom, logser, nbinom, poisson

import lightning_dp as ldp
from lightning_dp.accounting import (
    Phase,
    RDPAccountant,
    RDPBestOf,
    Repetitions,
    calibrate_noise_multiplier,
    claim,
    cross_checked,
    resolve_accountant,
)
from lightning_dp.accounting.rdp import ORDERS, composed_divergences
from lightning_dp.errors import PrivacyConfigurationError

from . import oracles

INF = math.inf
# With sampled batches their fractional orders take seconds and are not tight.
FEWER = [1.25, 1.5, 1.75, *map(float, range(2, 64)), 64.0, 128.0, 256.0, 512.0]
SETTINGS = [(10, 1), (10, 0), (3, 0.5), (50, 2), (1.5, 0), (400, 1), (10, INF), (100, INF)]


def their_epsilon(rate, noise, count, delta, mean, shape):
    event = dp_accounting.GaussianDpEvent(noise)
    event = event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event)
    theirs = RdpAccountant(orders=list(ORDERS) if rate == 1 else FEWER)
    theirs.compose(RepeatAndSelectDpEvent(dp_accounting.SelfComposedDpEvent(event, count), mean, shape))
    return float(theirs.get_epsilon(delta))


@pytest.mark.parametrize(("mean", "shape"), SETTINGS)
def test_like_dp_accounting(mean, shape):
    for rate, noise, count, delta in [(0.01, 1, 1000, 1e-5), (1, 20, 100, 1e-5), (0.1, 5, 1000, 1e-8)]:
        ours = RDPBestOf(Repetitions(mean, shape)).epsilon([Phase(noise, rate, count)], delta)
        theirs = their_epsilon(rate, noise, count, delta, mean, shape)
        assert ours == pytest.approx(theirs, rel=1e-8 if rate == 1 else 0.03)
        assert ours <= theirs * (1 + 1e-8)


def test_a_shape_below_zero_by_the_formula():
    """dp-accounting has none; theorem 2, order by order, with gamma found by summing the distribution."""
    mean, eta, mu, delta = 5.0, -0.5, 0.5, 1e-5

    def expected(gamma):
        terms = [eta * (1 - gamma) / (gamma**-eta - 1)]
        for k in range(1, 20_000):
            terms.append(terms[-1] * (1 - gamma) * (k + eta) / (k + 1))
        return math.fsum(k * p for k, p in enumerate(terms, 1)) / math.fsum(terms)

    low, high = 1e-3, 0.9
    for _ in range(60):
        low, high = ((low + high) / 2, high) if expected((low + high) / 2) > mean else (low, (low + high) / 2)
    found = math.inf
    for a, b in itertools.product(np.geomspace(1.05, 200, 200), np.geomspace(1.0, 500, 200)):
        bound = a * mu**2 / 2 + 0.5 * ((1 - 1 / b) * b * mu**2 / 2 - math.log(low) / b) + math.log(mean) / (a - 1)
        found = min(found, bound + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    ours = RDPBestOf(Repetitions(mean, eta)).epsilon([Phase(1 / mu, 1, 1)], delta)
    assert ours == pytest.approx(found, rel=2e-3)


def test_the_best_of_more_costs_more_and_never_less_than_one():
    phases = [Phase(1.0, 0.01, 1000)]
    costs = [RDPBestOf(Repetitions(mean)).epsilon(phases, 1e-5) for mean in (1.01, 2, 10, 100, 500)]
    assert costs == sorted(costs)
    assert costs[0] > RDPAccountant().epsilon(phases, 1e-5)


def test_releases_after_the_search_cost_no_more_than_is_said():
    one, later, delta = [Phase(2.0, 0.1, 50)], Phase(3.0, 0.2, 40), 1e-5
    theirs = RdpAccountant(orders=FEWER)
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(2.0))
    theirs.compose(RepeatAndSelectDpEvent(dp_accounting.SelfComposedDpEvent(sampled, 50), 10, 1))
    theirs.compose(dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(3.0)), 40)
    assert RDPBestOf(Repetitions(10, 1)).epsilon([*one, later], delta) >= float(theirs.get_epsilon(delta))


def test_a_run_that_hardly_ever_differs_is_nothing_only_if_all_of_them_hardly_ever_do():
    phases = [Phase(1.0, 1e-6, 10)]
    distance = 10 * 1e-6 * math.erf(1 / math.sqrt(8))
    for accountant in (RDPBestOf(Repetitions(10.0)), cross_checked(RDPBestOf(Repetitions(10.0)))):
        assert accountant.epsilon(phases, 10 * distance * 1.001) == 0
        assert accountant.epsilon(phases, 10 * distance * 0.999) > 0
    assert RDPAccountant().epsilon(phases, 1.001 * distance) == 0


@pytest.mark.parametrize(("mean", "shape"), [(10, 1), (4, 0), (20, INF)])
@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_calibrated_noise_spends_the_target_and_not_more(mean, shape, rate):
    best = RDPBestOf(Repetitions(mean, shape))
    noise = calibrate_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=rate, num_steps=300, accountant=best
    )
    assert 0.995 * 2.0 < their_epsilon(rate, noise, 300, 1e-5, mean, shape) <= 2.0 * (1 + (1e-9 if rate == 1 else 0.01))
    assert best.epsilon([Phase(noise, rate, 300)], 1e-5) <= 2.0
    one = calibrate_noise_multiplier(target_epsilon=2.0, target_delta=1e-5, sample_rate=rate, num_steps=300)
    assert noise > 1.2 * one


# ---- the number of runs ----------------------------------------------------------------------------------------------


def their_probability(mean, shape, k):
    """scipy's distributions, conditioned on at least one; gamma by a search for the expected number."""
    if shape == INF:
        return poisson.pmf(k, mean)
    if shape == 1:
        return geom.pmf(k, 1 / mean)
    low, high = 1e-9, 1 - 1e-9
    for _ in range(200):
        gamma = (low + high) / 2
        law = logser(1 - gamma) if shape == 0 else nbinom(shape, gamma)
        expected = law.mean() if shape == 0 else law.mean() / (1 - law.pmf(0))
        low, high = (gamma, high) if expected > mean else (low, gamma)
    return law.pmf(k) if shape == 0 else law.pmf(k) / (1 - law.pmf(0))


@pytest.mark.parametrize(("mean", "shape"), [*SETTINGS, (2.5, 7.0), (500, INF)])
def test_probabilities_like_scipy(mean, shape):
    numbers, found = zip(*itertools.islice(Repetitions(mean, shape).probabilities(), 5000), strict=True)
    assert found == pytest.approx(their_probability(mean, shape, np.array(numbers)), rel=1e-6, abs=1e-12)
    assert math.fsum(found) == pytest.approx(1, abs=1e-5)
    if mean <= 100:
        assert math.fsum(k * p for k, p in zip(numbers, found, strict=True)) == pytest.approx(mean, rel=1e-6)


def fit_to(draws, mean, shape):
    """The p-value of a chi-square test; numbers expected less than 10 times are taken together."""
    numbers = np.arange(0 if shape == INF else 1, 400)
    expected = their_probability(mean, shape, numbers) * len(draws)
    counts = np.array([np.sum(draws == k) for k in numbers])
    often = expected >= 10
    observed, thought = [*counts[often], len(draws) - counts[often].sum()], [*expected[often], 0.0]
    thought[-1] = len(draws) - sum(thought)
    return chisquare(observed, thought).pvalue


@pytest.mark.parametrize(("mean", "shape"), [(10, 1), (5, 0), (4, 0.5), (6, INF)])
def test_draws_follow_the_distribution(mean, shape):
    rng, repetitions = random.Random(7), Repetitions(mean, shape)
    draws = np.array([repetitions.draw(rng) for _ in range(20_000)])
    assert fit_to(draws, mean, shape) > 0.01
    assert fit_to(draws, 1.1 * mean, shape) < 1e-3  # a wrong gamma is seen
    assert fit_to(draws, mean, 2.0 if shape == 1 else 1.0) < 1e-6


def test_the_largest_random_number_ends_too():
    class Last(random.Random):
        def random(self):
            return 1 - 2**-53

    for shape in (0.0, 1.0, INF):
        assert 20 < Repetitions(10, shape).draw(Last()) < 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": 1}, "mean=1: expected a number above 1 and at most 500"),
        ({"mean": 501.0}, "mean=501.0: expected a number above 1 and at most 500"),
        ({"mean": "10"}, "mean='10': expected"),
        ({"shape": -1}, "shape=-1: expected a number above -1"),
        ({"shape": math.nan}, "shape=nan: expected a number above -1"),
        ({"shape": -INF}, "shape=-inf: expected a number above -1"),
    ],
)
def test_distributions_that_are_none_are_refused(arguments, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        ldp.Repetitions(**arguments)


# ---- names and words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "shape"), [*SETTINGS, (1 + 1e-9, -0.3)])
def test_the_name_is_enough(mean, shape):
    accountant = RDPBestOf(Repetitions(mean, shape))
    again = resolve_accountant(accountant.name)
    assert isinstance(again, RDPBestOf)
    assert again.repetitions == accountant.repetitions
    assert again.name == accountant.name


@pytest.mark.parametrize("name", ["rdp_best_of(10)", "rdp_best_of(10, x)", "rdp_best_of(0.5, 1)", "best_of(10, 1)"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(PrivacyConfigurationError, match=r"accountant='.*best_of.*': expected"):
        resolve_accountant(name)


def test_the_claim_says_what_must_stay_unknown():
    said = claim([Phase(1.0, 0.1, 5)], RDPBestOf(Repetitions(10, 1)), target_epsilon=3.0, epsilon=2.0)
    assert "best of a random number of runs (10 expected, shape 1)" in said
    assert "neither that number nor anything of the other runs is known" in said
    assert "best of" not in claim([Phase(1.0, 0.1, 5)], RDPAccountant(), target_epsilon=3.0, epsilon=2.0)


def test_the_oracle_and_ours_start_from_one_run():
    assert composed_divergences([Phase(20.0, 1.0, 100)])[0] == pytest.approx(ORDERS[0] * 100 / 800)
    assert oracles.pld_epsilon([(1, 20, 100)], 1e-5) < RDPBestOf(Repetitions(2)).epsilon([Phase(20.0, 1.0, 100)], 1e-5)
