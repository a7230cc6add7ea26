"""Processes that part without any setting telling so: an error in all of them, before or at the release."""

from unittest import mock

import pytest
import torch

import lightning_dp as ldp
from lightning_dp.noise import SharedRandom
from tests.models import Regression, loader, trainer
from tests.processes import fits, signals
from tests.processes.world import assert_errors, run


def test_data_and_models_that_differ_are_an_error_in_all_processes():
    expected = {
        "order of the data": "the training data or its order .* is not the same in all 2 processes",
        "users": "the training data or its order .* is not the same in all 2 processes",
        "attribute": "UnsupportedModelError: the gradient of one sample is not the same in all processes",
        "samples of others": "UnsupportedModelError: the gradient of a sample changes with the samples of another",
        "drift": "PrivacyError: the weights are no longer the same in all processes",
        "order of layers": "the module is not the same in all 2 processes",
        "order of optimizers": "UnsupportedModelError: the gradient of one sample is not the same in all processes",
        "nothing": "no error",
    }
    assert_errors(run(2, fits.parted), expected)


def test_a_process_that_looks_at_a_batch_by_itself_does_not_part_from_the_others():
    (first, weights), (second, others) = run(2, fits.peeked)
    assert first == second
    assert len(first) == 4
    assert weights == others


def test_a_key_gives_other_random_numbers_for_every_step():
    key = 2**100 + 17
    found = {step: SharedRandom(key, step).uniform(50) for step in (0, 1, 2, 1000)}
    assert torch.equal(found[1], SharedRandom(key, 1).uniform(50))
    assert not torch.equal(found[1], SharedRandom(key + 1, 1).uniform(50))
    assert len({tuple(values.tolist()) for values in found.values()}) == len(found)


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}])
def test_one_device_is_enough_whatever_started_the_process(environment):
    """A script that trains on two devices and then on one, in its second process."""
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with mock.patch.dict("os.environ", environment):
        made = trainer(dp, max_steps=2, devices=1)
        made.fit(Regression(), loader(n=10))
    assert (dp.world_size, dp.global_rank, dp.num_releases) == (1, 0, 2)


def test_tensors_of_all_types_are_told_and_means_of_16_bits_have_place_for_their_sums():
    (first, mean), second = run(2, signals.of_all_types)
    assert second == (first, mean)
    zero_to_five = [[0, 3], [1, 4], [2, 5]]
    for dtype in signals.TYPES:
        assert first[str(dtype)] == ([[0, 1], [1, 1], [1, 1]] if dtype == torch.bool else zero_to_five)
    assert first["scalar"] == 1
    assert mean == torch.tensor(signals.LARGE).half()
    assert (2 * torch.tensor(signals.LARGE).half()).isinf()
