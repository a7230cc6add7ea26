"""Any two of target, noise and steps give the third; anything else is refused with the way out."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_dp as ldp
from tests.accounting import oracles


def told(**changes):
    """A forecast of small numbers, with changes; ``None`` takes one away."""
    numbers = {"num_examples": 1000, "batch_size": 50, "target_epsilon": 2.0, "num_steps": 40} | changes
    return ldp.forecast(**{name: value for name, value in numbers.items() if value is not None})


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rate=st.floats(1e-3, 1.0), noise=st.floats(0.6, 20.0), num_steps=st.integers(1, 5000), delta=st.floats(1e-8, 1e-4)
)
def test_any_two_give_the_third(rate, noise, num_steps, delta):
    common = {"sample_rate": rate, "target_delta": delta, "accountant": "rdp"}
    spent = ldp.forecast(**common, noise_multiplier=noise, num_steps=num_steps).epsilon
    if not 0.01 < spent < 100:
        return
    found = ldp.forecast(**common, target_epsilon=spent, num_steps=num_steps)
    assert 0.995 * spent <= found.epsilon <= spent
    longest = ldp.forecast(**common, target_epsilon=spent, noise_multiplier=noise)
    assert longest.num_steps >= num_steps
    assert longest.epsilon <= spent < longest.epsilon_after(longest.num_steps + 1)


@pytest.mark.parametrize(("rate", "noise", "num_steps"), [(0.01, 1.0, 100), (0.2, 4.0, 60)])
def test_the_three_agree_with_dp_accounting(rate, noise, num_steps):
    common = {"sample_rate": rate, "target_delta": 1e-5}
    truth = oracles.pld_epsilon([(rate, noise, num_steps)], 1e-5)
    assert ldp.forecast(**common, noise_multiplier=noise, num_steps=num_steps).epsilon == pytest.approx(truth, rel=0.02)
    calibrated = ldp.forecast(**common, target_epsilon=truth, num_steps=num_steps).noise_multiplier
    assert oracles.pld_epsilon([(rate, calibrated, num_steps)], 1e-5) == pytest.approx(truth, rel=0.02)
    longest = ldp.forecast(**common, target_epsilon=truth, noise_multiplier=noise).num_steps
    assert oracles.pld_epsilon([(rate, noise, longest)], 1e-5) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("num_steps", [1, 100])
def test_full_batches_have_a_closed_form(num_steps):
    found = ldp.forecast(num_examples=500, batch_size=500, noise_multiplier=20.0, num_steps=num_steps)
    assert found.delta == 1 / 5000
    delta = oracles.gaussian_delta(math.sqrt(num_steps) / 20, found.epsilon)
    assert delta == pytest.approx(1 / 5000, rel=1e-4)


def test_it_is_what_the_functions_of_the_budget_return():
    common = {"sample_rate": 0.05, "target_epsilon": 2.0, "target_delta": 1e-4}
    noise = ldp.calibrate_noise_multiplier(**common, num_steps=40)
    assert told().noise_multiplier == noise
    assert told(num_steps=None, noise_multiplier=noise).num_steps == ldp.max_steps(**common, noise_multiplier=noise)
    spent = ldp.compute_epsilon(noise_multiplier=noise, sample_rate=0.05, num_steps=40, delta=1e-4)
    assert told(target_epsilon=None, noise_multiplier=noise).epsilon == spent


def test_the_rate_delta_and_steps_that_follow():
    common = {"noise_multiplier": 1.0, "target_epsilon": None}
    assert told(**common).delta == 1 / 10_000
    assert (told(**common).sample_rate, told(**common).batch_size) == (0.05, 50)
    assert told(**common, target_delta=1e-6).delta == 1e-6
    rate = told(**common, batch_size=None, sample_rate=0.1)
    assert (rate.batch_size, rate.delta) == (100, 1 / 10_000)
    assert ldp.forecast(sample_rate=0.1, target_delta=1e-5, noise_multiplier=1.0, num_steps=3).batch_size is None


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1000, 50), (1001, 50), (49, 1), (60000, 256), (7, 7)])
def test_an_epoch_is_as_long_as_a_dataloader(num_examples, batch_size):
    from torch.utils.data import DataLoader

    length = len(DataLoader(range(num_examples), batch_size=batch_size))
    sizes = {"num_examples": num_examples, "batch_size": batch_size}
    found = ldp.forecast(**sizes, noise_multiplier=1.0, num_epochs=3, accountant="rdp")
    assert found.num_steps == 3 * length


REFUSED = [
    ({"noise_multiplier": 1.0}, r"target_epsilon, noise_multiplier and num_steps are all given.*Leave out noise_mult"),
    ({"noise_multiplier": 1.0, "num_steps": None, "num_epochs": 2}, r"noise_multiplier and num_epochs are all given"),
    ({"num_steps": None}, r"only target_epsilon is given.*Add noise_multiplier or num_steps \(num_epochs"),
    ({"target_epsilon": None}, r"only num_steps is given.*Add target_epsilon or noise_multiplier \("),
    (
        {"target_epsilon": None, "num_steps": None, "num_epochs": 2},
        r"only num_epochs is given.*Add target_epsilon or no",
    ),
    (
        {"target_epsilon": None, "num_steps": None},
        r"none of target_epsilon, noise_multiplier and num_steps.*Add two of",
    ),
    ({"num_epochs": 2}, r"num_steps=40 and num_epochs=2 are both given. Leave out one"),
    ({"num_steps": 0}, r"num_steps=0: expected an integer of at least 1"),
    ({"num_steps": 2.5}, r"num_steps=2.5: expected an integer"),
    ({"num_steps": None, "num_epochs": 0}, r"num_epochs=0: expected an integer of at least 1"),
    ({"num_examples": 0}, r"num_examples=0: expected an integer of at least 1"),
    ({"num_examples": -1}, r"num_examples=-1: expected an integer"),
    ({"batch_size": 0}, r"batch_size=0: expected an integer of at least 1"),
    ({"batch_size": 1001}, r"batch_size=1001 with num_examples=1000: expected at most 1000"),
    ({"sample_rate": 0.1}, r"sample_rate=0.1 and batch_size=50 are both given.*Leave out one"),
    ({"batch_size": None, "sample_rate": 1.5}, r"sample_rate=1.5: expected a probability in \(0, 1\]"),
    ({"batch_size": None}, r"the sample rate is not known.*Add batch_size\."),
    ({"num_examples": None}, r"the sample rate is not known.*Add num_examples\."),
    ({"num_examples": None, "batch_size": None}, r"Add num_examples and batch_size\."),
    ({"num_examples": None, "batch_size": None, "sample_rate": 0.1}, r"target_delta is not given.*Add target_delta or"),
    ({"target_delta": 0.01}, r"target_delta=0.01 with N=1000 training examples: expected less than 1/N = 0.001"),
    ({"target_delta": 0.0}, r"target_delta=0.0: expected a probability in \(0, 1\)"),
    ({"target_epsilon": -1.0}, r"target_epsilon=-1.0: expected a finite number > 0"),
    ({"target_epsilon": None, "noise_multiplier": 0}, r"noise_multiplier=0: without noise epsilon is infinite"),
    ({"target_epsilon": None, "noise_multiplier": -1}, r"noise_multiplier=-1: expected a finite number >= 0"),
    (
        {"num_steps": None, "noise_multiplier": 0.1},
        r"target_epsilon=2 is too small for a single step.*at least 75\.",
    ),
    ({"accountant": "moments"}, r"accountant='moments': expected"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_refusals(changes, message):
    with pytest.raises(ldp.PrivacyConfigurationError) as refused:
        told(**changes)
    assert re.search(message, str(refused.value))
