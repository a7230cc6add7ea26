"""The tables of a forecast: every number is checked against a formula, the budget's functions, or dp-accounting."""

import math
import time

import pytest

import lightning_dp as ldp
from lightning_dp.accounting import Accountant, Phase, RDPAccountant
from lightning_dp.forecasting import Forecast
from lightning_dp.forecasting.search import Answer, Question, answer_in_turn
from tests.accounting import oracles

DIGITS = {"num_examples": 1437, "batch_size": 719, "target_delta": 1e-4}


@pytest.fixture(scope="module")
def digits():
    return ldp.forecast(**DIGITS, target_epsilon=3.0, num_steps=60)


@pytest.fixture(scope="module")
def sparse():
    return ldp.forecast(num_examples=20_000, batch_size=64, noise_multiplier=1.0, num_steps=300, accountant="rdp")


def spent(found, noise, rate, num_steps):
    return ldp.compute_epsilon(noise_multiplier=noise, sample_rate=rate, num_steps=num_steps, delta=found.delta)


# ---- epsilon over the steps ----------------------------------------------------------------------------------------


def test_epsilon_after_steps(digits):
    assert [row.num_steps for row in digits.after_steps] == [1, 2, 4, 8, 15, 30, 60, 120]
    for row in digits.after_steps:
        assert row.epsilon == spent(digits, digits.noise_multiplier, 719 / 1437, row.num_steps)
    for row in digits.after_steps[::4]:
        truth = oracles.pld_epsilon([(719 / 1437, digits.noise_multiplier, row.num_steps)], 1e-4)
        assert row.epsilon == pytest.approx(truth, rel=0.02)


def test_what_was_spent_before_counts():
    before = (Phase(2.0, 0.1, 5),)
    found = Forecast(0.1, 1e-5, noise_multiplier=1.0, num_steps=7, target_epsilon=9.0, num_allowed=9, spent=before)
    assert {7, 9, 14} < {row.num_steps for row in found.after_steps}
    for row in found.after_steps[2::3]:
        truth = oracles.pld_epsilon([(0.1, 2.0, 5), (0.1, 1.0, row.num_steps)], 1e-5)
        assert row.epsilon == pytest.approx(truth, rel=0.02)
    assert (found.noise_for, found.batches, found.best_batch) == ((), (), None)


def test_endless_steps():
    found = Forecast(0.3, 1e-5, noise_multiplier=1.0, num_steps=None)
    assert (found.epsilon, found.goal, found.noise_for, found.batches) == (None, None, (), ())
    assert [row.num_steps for row in found.after_steps] == [1, 2, 4, 8]  # up to two passes of 4 steps


# ---- noise for other epsilons --------------------------------------------------------------------------------------


def test_noise_for_other_epsilons(digits):
    assert [row.epsilon for row in digits.noise_for] == [0.5, 1, 2, 3, 4, 6, 8]
    for row in digits.noise_for:
        assert 0.99 * row.epsilon <= spent(digits, row.noise_multiplier, 719 / 1437, 60) <= row.epsilon
    for row in digits.noise_for[::3]:
        truth = oracles.pld_epsilon([(719 / 1437, row.noise_multiplier, 60)], 1e-4)
        assert row.epsilon == pytest.approx(truth, rel=0.02)
    assert digits.noise_for[3].noise_multiplier == digits.noise_multiplier


def test_without_a_target_the_epsilon_of_the_end_is_compared_at(sparse):
    assert sparse.goal == sparse.epsilon
    assert (sparse.epsilon, 1.0) in [(row.epsilon, row.noise_multiplier) for row in sparse.noise_for]
    assert len(sparse.noise_for) == 8


def test_a_noise_that_does_not_meet_the_target_is_replaced():
    settings = {"target_epsilon": 2.0, "num_steps": 40, "accountant": "rdp"}
    found = Forecast(0.05, 1e-5, noise_multiplier=3.0, num_examples=1000, **settings)
    (here,) = [row for row in found.noise_for if row.epsilon == 2.0]
    expected = ldp.calibrate_noise_multiplier(**settings, target_delta=1e-5, sample_rate=0.05)
    assert here.noise_multiplier == pytest.approx(expected, rel=0.01)
    (same,) = [option for option in found.batches if option.batch_size == 50]
    assert same.noise_multiplier == pytest.approx(expected, rel=0.01)


def test_several_releases_from_one_draw_need_more_noise():
    one, four = (
        Forecast(0.05, 1e-5, z, num_steps=40, target_epsilon=2.0, releases_per_draw=k, accountant="rdp")
        for z, k in ((1.2, 1), (2.4, 4))
    )
    assert four.epsilon == one.epsilon
    for single, fourth in zip(one.noise_for, four.noise_for, strict=True):
        assert fourth.noise_multiplier == pytest.approx(2 * single.noise_multiplier, rel=1e-12)


# ---- batch sizes ---------------------------------------------------------------------------------------------------


def test_batch_sizes(digits):
    assert [(o.batch_size, o.num_steps) for o in digits.batches] == [
        (pytest.approx(90), 479),
        (pytest.approx(180), 240),
        (pytest.approx(360), 120),
        (pytest.approx(719), 60),
        (1437, 30),
    ]
    for option in digits.batches:
        assert option.sample_rate == pytest.approx(option.batch_size / 1437, rel=1e-12)
        assert option.noise_per_step == pytest.approx(option.noise_multiplier / option.batch_size)
        assert 0.99 * 3 <= spent(digits, option.noise_multiplier, option.sample_rate, option.num_steps) <= 3
    for option in digits.batches[:2]:
        truth = oracles.pld_epsilon([(option.sample_rate, option.noise_multiplier, option.num_steps)], 1e-4)
        assert truth == pytest.approx(3, rel=0.02)
    full = digits.batches[-1]  # closed form
    assert oracles.gaussian_delta(math.sqrt(30) / full.noise_multiplier, 3.0) <= 1e-4
    assert oracles.gaussian_delta(math.sqrt(30) / full.noise_multiplier, 2.96) > 1e-4


def test_noise_over_a_run_is_that_of_a_sum_over_its_signal(sparse):
    """Counted a second way: the sum of T noisy means, each of a signal 1, has the relative noise of the run."""
    for option in sparse.batches:
        variance = sum((option.noise_multiplier / option.batch_size) ** 2 for _ in range(option.num_steps))
        assert option.noise_per_run == pytest.approx(math.sqrt(variance) / option.num_steps)
        assert option.noise_per_run_times_n == pytest.approx(20_000 * option.noise_per_run)


def test_the_best_batch_is_the_smallest_near_the_least(sparse):
    assert [round(o.batch_size) for o in sparse.batches] == [8, 16, 32, 64, 128, 256, 512, 1024]
    runs = {round(o.batch_size): o.noise_per_run for o in sparse.batches}
    best = round(sparse.best_batch.batch_size)
    assert runs[best] <= 1.05 * min(runs.values()) < runs[best // 2]


def test_batches_never_exceed_all_examples_and_have_a_step_each(sparse):
    # 300 steps of 64 draw 19,200 examples: less than one pass, so no full batch.
    assert max(o.batch_size for o in sparse.batches) == 1024
    small = ldp.forecast(num_examples=10, batch_size=3, noise_multiplier=2.0, num_steps=1, accountant="rdp")
    assert [round(o.batch_size) for o in small.batches] == [1, 2, 3]  # whole, and not a third of a step
    rate = ldp.forecast(sample_rate=0.5, target_delta=1e-5, noise_multiplier=2.0, num_steps=16, accountant="rdp")
    assert [o.sample_rate for o in rate.batches] == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert {o.batch_size for o in rate.batches} == {o.noise_per_step for o in rate.batches} == {None}
    assert {o.noise_per_run for o in rate.batches} == {None}
    assert rate.best_batch is not None


def test_no_tables_where_nothing_is_spent():
    found = Forecast(1e-6, 1e-4, noise_multiplier=1.0, num_steps=2)
    assert (found.epsilon, found.noise_for, found.batches) == (0.0, (), ())


# ---- the search ----------------------------------------------------------------------------------------------------


class Counting(Accountant):
    """Counts its questions, and is some way off the Renyi bound, by a quotient that drifts with the noise."""

    name = "counting"

    def __init__(self):
        self.count = 0

    def _epsilon(self, phases, delta):
        self.count += 1
        return RDPAccountant().epsilon(phases, delta) * phases[0].noise_multiplier ** -0.05 * 0.9


def test_a_neighbours_answer_saves_questions():
    accountant, own = Counting(), Question(3.0, 0.01, 1000)
    questions = [Question(epsilon, 0.01, 1000) for epsilon in (4.0, 5.0, 6.0, 7.0, 8.0)]
    start = next(answer_in_turn(accountant, 1e-5, [own], own, Answer(1.0, 0.0)))
    accountant.count = 0
    answers = list(answer_in_turn(accountant, 1e-5, questions, own, start))
    asked = accountant.count
    for question, answer in zip(questions, answers, strict=True):
        epsilon = accountant.epsilon([Phase(answer.noise_multiplier, 0.01, 1000)], 1e-5)
        assert 0.99 * question.epsilon <= epsilon <= question.epsilon
    assert asked <= 3 * len(questions)  # one for the noise and one for the quotient, mostly; nothing is cached here


@pytest.mark.parametrize("start", [1e-3, 0.05, 1.0, 300.0])
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 60.0])
def test_any_start_leads_to_the_noise(start, epsilon):
    question = Question(epsilon, 0.02, 50)
    (answer,) = answer_in_turn(RDPAccountant(), 1e-5, [question], question, Answer(start, 0.0))
    spent = RDPAccountant().epsilon([Phase(answer.noise_multiplier, 0.02, 50)], 1e-5)
    assert 0.99 * epsilon <= spent <= epsilon


def test_a_jump_ends_with_a_noise_that_was_seen_to_do():
    """Epsilon is 0 as soon as the total variation is below delta, so some epsilons are never spent."""
    question = Question(1e-4, 1e-4, 1)
    (answer,) = answer_in_turn(RDPAccountant(), 5e-5, [question], question, Answer(1.0, 0.0))
    assert RDPAccountant().epsilon([Phase(answer.noise_multiplier, 1e-4, 1)], 5e-5) <= 1e-4
    least = Question(1.0, 1e-6, 1)  # no noise spends anything
    (answer,) = answer_in_turn(RDPAccountant(), 1e-4, [least], least, Answer(1.0, 0.0))
    assert answer.noise_multiplier == 1e-3


@pytest.mark.slow
def test_all_tables_of_a_common_plan_take_seconds():
    began = time.process_time()
    found = ldp.forecast(num_examples=60_000, batch_size=256, target_epsilon=3.0, num_steps=14_000)
    assert len(found.after_steps) == 11
    for row in found.noise_for:
        assert 0.99 * row.epsilon <= spent(found, row.noise_multiplier, 256 / 60_000, 14_000) <= row.epsilon
    for option in found.batches:
        assert 2.97 <= spent(found, option.noise_multiplier, option.sample_rate, option.num_steps) <= 3
        if option.sample_rate < 1:
            truth = oracles.pld_epsilon([(option.sample_rate, option.noise_multiplier, option.num_steps)], found.delta)
            assert truth == pytest.approx(3, rel=0.02)
    assert time.process_time() - began < 120
