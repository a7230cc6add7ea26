"""The shares of a search, against the hockey-stick integral, dp-accounting and the numbers of arXiv 2212.04486."""

import math

import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from lightning_dp.accounting import Ledger, Phase, PRVAccountant, Release, max_further_releases
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyConfigurationError
from lightning_dp.tuning import SearchPlan, gaussian_mu
from lightning_dp.tuning.shares import gaussian_noise, spent_mu
from tests.accounting.oracles import gaussian_delta, pld_epsilon

PAPER = [((0.05, 0.1, 0.96), 0.992), ((0.01, 0.1, 0.97), 0.995), ((0.05, 0.2, 0.9), 0.997)]
DELTA = 1e-5


def delta_by_formula(mu, epsilon):
    """Dong et al. 2019, corollary 2.13."""
    return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)


def mu_by_formula(epsilon, delta):
    return brentq(lambda mu: delta_by_formula(mu, epsilon) - delta, 1e-4, 20, xtol=1e-13)


def epsilon_by_formula(mu, delta):
    return brentq(lambda epsilon: delta_by_formula(mu, epsilon) - delta, 1e-6, 50, xtol=1e-13)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 1e-5), (0.96, 1e-5), (3, 1e-6), (20, 1e-3)])
def test_mu_is_the_inverse_of_the_hockey_stick_divergence(epsilon, delta):
    assert gaussian_mu(epsilon, delta) == pytest.approx(mu_by_formula(epsilon, delta), rel=1e-6)
    assert gaussian_delta(gaussian_mu(epsilon, delta), epsilon) <= delta * (1 + 1e-9)


@pytest.mark.parametrize(("epsilons", "total"), PAPER)
def test_the_splits_of_the_paper_compose_to_its_totals(epsilons, total):
    mus = [mu_by_formula(epsilon, DELTA) for epsilon in epsilons]
    mu = math.sqrt(3 * mus[0] ** 2 + 3 * mus[1] ** 2 + mus[2] ** 2)
    plan = SearchPlan(1.0, DELTA, epsilons)
    assert round(plan.epsilon, 3) == total
    assert plan.epsilon == pytest.approx(epsilon_by_formula(mu, DELTA), rel=1e-6)


@pytest.mark.parametrize("epsilons", [PAPER[0][0], PAPER[2][0]])
def test_whatever_the_steps_dp_accounting_finds_no_more_than_the_target(epsilons):
    steps = [(7, 30, 100), (1, 55, 12), (80,)]
    plan = SearchPlan(1.0, DELTA, epsilons)
    releases = [(1, plan.noise_multiplier(stage, n), n) for stage, several in enumerate(steps) for n in several]
    assert pld_epsilon(releases, DELTA) == pytest.approx(plan.epsilon, abs=2e-3)
    assert plan.epsilon < 1.0


@pytest.mark.parametrize(
    ("target", "delta", "small"), [(1.0, 1e-5, (0.05, 0.1)), (8.0, 1e-6, (1.0, 2.5)), (0.1, 1e-4, None)]
)
def test_the_final_run_has_all_that_is_left(target, delta, small):
    plan = SearchPlan.within(target, delta, small_epsilons=small)
    mus = [mu_by_formula(epsilon, delta) for epsilon in plan.epsilons]
    total = epsilon_by_formula(math.sqrt(3 * mus[0] ** 2 + 3 * mus[1] ** 2 + mus[2] ** 2), delta)
    assert target * (1 - 1e-5) < total <= target * (1 + 1e-6)
    assert target * (1 - 1e-6) < plan.epsilon <= target


def test_the_paper_leaves_a_little_of_its_budget():
    assert SearchPlan.within(1.0, DELTA, small_epsilons=(0.05, 0.1)).epsilons[2] == pytest.approx(0.968, abs=1e-3)


@pytest.mark.parametrize("steps", [1, 17, 100, 4321])
def test_the_ledgers_own_budget_allows_exactly_the_planned_steps(steps):
    plan, ledger = SearchPlan.within(1.0, DELTA), Ledger()
    for stage, several in enumerate([(11, 30, 100), (10, 55, 12)]):
        for n in several:
            for _ in range(n):
                ledger.book(Release(plan.noise_multiplier(stage, n), 1.0))
    noise = gaussian_noise(plan.final_mu(ledger.phases), steps)
    allowed = max_further_releases(
        PRVAccountant(),
        lambda n: [[*ledger.phases, Phase(noise, 1.0, n)]],
        target_epsilon=plan.target_epsilon,
        delta=DELTA,
    )
    assert allowed == steps


def test_a_run_that_was_made_twice_is_taken_from_the_final_one():
    plan = SearchPlan.within(1.0, DELTA)
    made = [Phase(plan.noise_multiplier(0, 50), 1.0, 150), Phase(plan.noise_multiplier(1, 20), 1.0, 60)]
    again = Phase(plan.noise_multiplier(1, 20), 1.0, 13)
    noise = gaussian_noise(plan.final_mu([*made, again]), 40)
    assert noise > gaussian_noise(plan.final_mu(made), 40)
    squares = sum(p.num_releases / p.noise_multiplier**2 for p in (*made, again)) + 40 / noise**2
    assert epsilon_by_formula(math.sqrt(squares), DELTA) == pytest.approx(1.0, abs=1e-6)


def test_nothing_spent_has_no_mu_and_no_noise_has_all():
    assert spent_mu([]) == 0
    assert spent_mu([Phase(0, 1.0, 1)]) == math.inf
    assert spent_mu([Phase(2.0, 1.0, 9), Phase(5.0, 1.0, 0)]) == pytest.approx(1.5)


def test_too_many_repeated_runs_leave_nothing_for_the_final_one():
    plan = SearchPlan.within(1.0, DELTA)
    spent = [Phase(plan.noise_multiplier(2, 10), 1.0, 10), Phase(plan.noise_multiplier(1, 10), 1.0, 30)]
    with pytest.raises(PrivacyBudgetExceeded, match=r"of target_epsilon=1 are spent before the final run.*new search"):
        plan.final_mu(spent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_epsilon": 0.99}, r"epsilon 0.991733 at delta 1e-05: expected at most target_epsilon=0.99"),
        ({"target_epsilon": -1}, "target_epsilon=-1"),
        ({"target_delta": 0}, "target_delta=0"),
        ({"epsilons": (0.05, 0.96), "num_runs": (3, 1)}, "at least two small stages"),
        ({"num_runs": (3, 1)}, "one number for each stage"),
        ({"num_runs": (3, 0, 1)}, "at least 1 of each stage"),
        ({"num_runs": (3, 3, 2)}, "1 final run"),
        ({"epsilons": (0.1, 0.05, 0.9)}, "each to be larger than the one before"),
        ({"epsilons": (0.0, 0.05, 0.9)}, "expected a finite number > 0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        SearchPlan(**{"target_epsilon": 1.0, "target_delta": DELTA, "epsilons": (0.05, 0.1, 0.96), **arguments})


@pytest.mark.parametrize("small", [(0.3, 0.5), (0.9, 0.95)])
def test_small_runs_that_leave_too_little_are_refused(small):
    with pytest.raises(PrivacyConfigurationError, match="to the final run: expected more than"):
        SearchPlan.within(1.0, DELTA, small_epsilons=small)


def test_sampled_batches_are_refused():
    with pytest.raises(PrivacyConfigurationError, match=r"sample_rate=0.5 in a search: expected 1.*batch_size=len"):
        spent_mu([Phase(1.0, 0.5, 1)])


def test_no_steps_are_refused():
    with pytest.raises(PrivacyConfigurationError, match="num_steps=0: expected at least 1"):
        SearchPlan.within(1.0, DELTA).noise_multiplier(0, 0)
