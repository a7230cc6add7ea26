"""From a budget to noise or steps: the answers hold for the numbers that compute_epsilon returns."""

import math

import numpy as np
import pytest

from lightning_dp.accounting import (
    MAX_RELEASES,
    Accountant,
    Phase,
    PRVAccountant,
    RDPAccountant,
    calibrate,
    calibrate_noise_multiplier,
    compute_epsilon,
    max_further_releases,
    max_steps,
)
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyConfigurationError

from . import oracles


def test_compute_epsilon_is_the_accountants():
    value = compute_epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=np.int64(1000), delta=1e-5)
    assert 1.8282 <= value <= 1.8384
    renyi = compute_epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=1000, delta=1e-5, accountant="rdp")
    assert value < renyi < 1.25 * value
    assert compute_epsilon(noise_multiplier=0, sample_rate=0.01, num_steps=1, delta=1e-5) == math.inf
    assert compute_epsilon(noise_multiplier=1, sample_rate=0.01, num_steps=0, delta=1e-5) == 0


CALIBRATIONS = [  # target_epsilon, target_delta, sample_rate, num_steps
    (3.0, 1e-5, 0.01, 2666),
    (1.0, 1e-6, 0.002, 500),
    (0.01, 1e-5, 0.01, 1000),
    (100.0, 1e-5, 0.1, 1000),
    (1.0, 1e-5, 0.5, 1),
    (2.0, 1e-5, 1.0, 50),
]


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("target", "delta", "rate", "count"), CALIBRATIONS)
def test_calibration(target, delta, rate, count, accountant):
    noise = calibrate_noise_multiplier(
        target_epsilon=target, target_delta=delta, sample_rate=rate, num_steps=count, accountant=accountant
    )
    spent = compute_epsilon(
        noise_multiplier=noise, sample_rate=rate, num_steps=count, delta=delta, accountant=accountant
    )
    assert 0.995 * target <= spent <= target
    if accountant == "prv" and target < 50:
        assert oracles.pld_epsilon([(rate, noise, count)], delta) == pytest.approx(target, rel=0.012)


@pytest.mark.slow
def test_calibration_to_random_targets():
    random, shares = np.random.default_rng(4), []
    for _ in range(100):
        target, delta = float(10 ** random.uniform(-2, 2)), float(10 ** random.uniform(-8, -4))
        rate, count = float(10 ** random.uniform(-4, 0)), int(10 ** random.uniform(0, 5))
        if count * rate <= 2 * delta:
            continue
        noise = calibrate_noise_multiplier(target_epsilon=target, target_delta=delta, sample_rate=rate, num_steps=count)
        spent = compute_epsilon(noise_multiplier=noise, sample_rate=rate, num_steps=count, delta=delta)
        assert 0.995 * target <= spent <= target, (target, delta, rate, count, noise, spent)
        shares.append(spent / target)
    print(f"{len(shares)} targets, share spent: {min(shares):.5f}, {np.median(shares):.5f}, {max(shares):.5f}")


def test_closed_form_calibration():
    """One full batch: the noise is known from the Gaussian mechanism's exact delta."""
    noise = calibrate_noise_multiplier(target_epsilon=2, target_delta=1e-5, sample_rate=1, num_steps=1)
    assert oracles.gaussian_delta(1 / noise, 2.0) <= 1e-5
    assert oracles.gaussian_delta(1 / (noise * 0.995), 2.0) > 1e-5


@pytest.mark.parametrize(("rate", "count", "expected"), [(0.1, 0, 0.0), (1e-7, 10, 1e-3)])
def test_calibration_where_no_noise_is_needed(rate, count, expected):
    noise = calibrate_noise_multiplier(target_epsilon=1, target_delta=1e-5, sample_rate=rate, num_steps=count)
    assert noise == expected
    assert compute_epsilon(noise_multiplier=noise, sample_rate=rate, num_steps=count, delta=1e-5) == 0


BUDGETS = [  # target_epsilon, target_delta, noise_multiplier, sample_rate
    (3.0, 1e-5, 1.0, 0.01),
    (1.0, 1e-6, 3.0, 0.05),
    (0.1, 1e-5, 1.0, 0.01),
    (100.0, 1e-5, 0.7, 0.1),
    (2.0, 1e-5, 20.0, 1.0),
    (8.0, 1e-5, 2.0, 0.005),
]


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("target", "delta", "noise", "rate"), BUDGETS)
def test_max_steps_bracket(target, delta, noise, rate, accountant):
    steps = max_steps(
        target_epsilon=target, target_delta=delta, noise_multiplier=noise, sample_rate=rate, accountant=accountant
    )

    def epsilon(count: int) -> float:
        return compute_epsilon(
            noise_multiplier=noise, sample_rate=rate, num_steps=count, delta=delta, accountant=accountant
        )

    assert epsilon(steps) <= target < epsilon(steps + 1)


def test_max_steps_near_dp_accounting():
    steps = max_steps(target_epsilon=3, target_delta=1e-5, noise_multiplier=1, sample_rate=0.01)
    assert 2666 * 0.985 <= steps <= 2666


def test_max_steps_edges():
    assert max_steps(target_epsilon=3, target_delta=1e-5, noise_multiplier=0, sample_rate=0.01) == 0
    assert max_steps(target_epsilon=0.1, target_delta=1e-5, noise_multiplier=0.5, sample_rate=1) == 0
    endless = max_steps(target_epsilon=9, target_delta=1e-5, noise_multiplier=1e4, sample_rate=1e-7, accountant="rdp")
    assert endless == MAX_RELEASES


def test_further_releases_after_a_history():
    spent, accountant = [Phase(1.0, 0.01, 1000)], PRVAccountant()
    more = max_further_releases(
        accountant, lambda count: [[*spent, Phase(1.2, 0.02, count)]], target_epsilon=2.7, delta=1e-5
    )
    assert more == pytest.approx(500, rel=0.02)  # dp-accounting: 500 releases give 2.6878
    assert accountant.epsilon([*spent, Phase(1.2, 0.02, more)], 1e-5) <= 2.7
    assert accountant.epsilon([*spent, Phase(1.2, 0.02, more + 1)], 1e-5) > 2.7


@pytest.mark.parametrize("spent", [Phase(1.0, 0.01, 10**5), Phase(0.0, 0.01, 1)])
def test_no_further_release_after_too_much(spent):
    more = max_further_releases(
        PRVAccountant(), lambda count: [[spent, Phase(1, 0.01, count)]], target_epsilon=1, delta=1e-5
    )
    assert more == 0


def test_the_greatest_of_several_histories_counts():
    """Two partitions: what is left is what fits into the one that has spent more."""
    spent = [[Phase(1.0, 0.01, 1000)], [Phase(1.0, 0.01, 2000)]]
    more = max_further_releases(
        PRVAccountant(), lambda n: [[*history, Phase(1.0, 0.01, n)] for history in spent], target_epsilon=3, delta=1e-5
    )
    alone = max_steps(target_epsilon=3, target_delta=1e-5, noise_multiplier=1, sample_rate=0.01)
    assert more == alone - 2000


@pytest.mark.parametrize("accountant", [PRVAccountant(), RDPAccountant()])
def test_calibration_after_a_history(accountant):
    spent = [Phase(1.0, 0.01, 1000)]
    noise = calibrate(accountant, lambda z: [[*spent, Phase(z, 0.02, 500)]], target_epsilon=2.7, delta=1e-5)
    if accountant.name == "prv":
        assert noise == pytest.approx(1.2, rel=0.01)  # dp-accounting: 1.2 gives 2.6878
    assert oracles.pld_epsilon([(0.01, 1.0, 1000), (0.02, noise, 500)], 1e-5) <= 2.7
    assert 2.7 * 0.995 <= accountant.epsilon([*spent, Phase(noise, 0.02, 500)], 1e-5) <= 2.7


def test_calibration_after_too_much():
    with pytest.raises(
        PrivacyBudgetExceeded, match=r"target_epsilon=1: earlier releases alone have spent epsilon 1\.8"
    ):
        calibrate(
            PRVAccountant(),
            lambda z: [[Phase(1.0, 0.01, 1000), Phase(z, 0.02, 500)]],
            target_epsilon=1.0,
            delta=1e-5,
        )


class Jumping(Accountant):
    """An accountant with a known answer that jumps: searches must neither hang nor overstep."""

    name = "jumping"

    def _epsilon(self, phases, delta):
        total = sum(phase.num_releases / phase.noise_multiplier for phase in phases)
        return total if total < 500 else total + 1e6


def test_searches_over_a_jumping_accountant():
    arguments = {"target_epsilon": 600, "target_delta": 1e-5, "sample_rate": 0.5, "accountant": Jumping()}
    assert max_steps(noise_multiplier=1.0, **arguments) == 499
    noise = calibrate_noise_multiplier(num_steps=1000, **arguments)
    assert 2 < noise < 2 + 1e-6


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "3", None, True])
def test_bad_target_epsilon(value):
    with pytest.raises(PrivacyConfigurationError, match=r"target_epsilon=.*expected a finite number > 0"):
        max_steps(target_epsilon=value, target_delta=1e-5, noise_multiplier=1, sample_rate=0.1)
    with pytest.raises(ValueError, match=r"target_epsilon=.*expected a finite number > 0"):
        calibrate_noise_multiplier(target_epsilon=value, target_delta=1e-5, num_steps=1, sample_rate=0.1)


GOOD = {"noise_multiplier": 1.0, "sample_rate": 0.1, "num_steps": 1, "delta": 1e-5}


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_multiplier", math.nan), ("sample_rate", 0), ("num_steps", -1), ("num_steps", True), ("num_steps", 1.5),
     ("delta", 1.0), ("accountant", "pld2")],
)  # fmt: skip
def test_bad_arguments_of_compute_epsilon(name, value):
    with pytest.raises(PrivacyConfigurationError, match=f"{name}={value!r}: expected"):
        compute_epsilon(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("target_delta", 0), ("sample_rate", 2), ("num_steps", -1), ("accountant", "x")]
)
def test_bad_arguments_of_calibration(name, value):
    good = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "num_steps": 10}
    with pytest.raises(PrivacyConfigurationError, match=f"{name}={value!r}: expected"):
        calibrate_noise_multiplier(**{**good, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("target_delta", 1), ("sample_rate", 0), ("noise_multiplier", -1), ("accountant", "x")]
)
def test_bad_arguments_of_max_steps(name, value):
    good = {"target_epsilon": 1.0, "target_delta": 1e-5, "sample_rate": 0.1, "noise_multiplier": 1.0}
    with pytest.raises(PrivacyConfigurationError, match=f"{name}={value!r}: expected"):
        max_steps(**{**good, name: value})
