"""Training of a sharded model on several processes, against a loop of autograd.grad over the samples in one."""

import math
from functools import cache

import pytest
import torch

from tests.processes import sharded
from tests.processes.world import ended

pytestmark = pytest.mark.skipif(not sharded.ON_CPU, reason="FSDP2 of torch 2.6 needs a GPU")

SIZES = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]


@cache
def outcomes(size):
    return ended(size, sharded.updates, size, timeout=600)


def found(size):
    assert all(error is None for _, error in outcomes(size)), [error for _, error in outcomes(size)]
    return [value for value, _ in outcomes(size)]


def assert_by_hand(name, size, atol=1e-10, **settings):
    every = [process[name] for process in found(size)]
    first = every[0]
    assert all(other["end"] == first["end"] and other["draws"] == first["draws"] for other in every)
    assert all(other["rate"] == first["rate"] and other["releases"] == len(first["draws"]) for other in every)
    reference = sharded.by_hand(first, **settings)
    assert list(reference) == list(first["end"])
    for name, p in reference.items():
        torch.testing.assert_close(torch.tensor(first["end"][name], dtype=p.dtype), p, rtol=0, atol=atol)
    return first


@pytest.mark.parametrize("size", SIZES)
def test_every_example_in_each_step(size):
    first = assert_by_hand("flat", size)
    assert first["rate"] == 1
    assert first["draws"] == [list(range(12))] * 2
    assert first["kinds"] == ["DTensor torch.float64"]
    assert all(first["end"][name] != p for name, p in first["start"].items())


@pytest.mark.parametrize("size", SIZES)
def test_draws_that_are_empty_or_leave_a_process_without_samples(size):
    first = assert_by_hand("empty draws", size, expected=4)
    assert first["draws"] == sharded.FORCED


@pytest.mark.parametrize("size", SIZES)
def test_layers_that_are_clipped_one_by_one(size):
    first = assert_by_hand("per layer", size, max_grad_norm=0.5, per_layer=True)
    flat = sharded.by_hand(first, max_grad_norm=0.5)
    assert any(not torch.allclose(torch.tensor(first["end"][n]).double(), p, atol=1e-3) for n, p in flat.items())


@pytest.mark.parametrize("size", SIZES)
def test_biases_alone(size):
    first = assert_by_hand("biases", size, trained="bias")
    assert all((first["end"][name] != p) == ("bias" in name) for name, p in first["start"].items())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_gathered_in_16_bits_of_which_sums_have_32(size):
    first = assert_by_hand("16 bits", size, atol=3e-2, cast=torch.bfloat16)
    assert first["kinds"] == ["DTensor torch.float32"]
    ends = torch.cat([torch.tensor(p).flatten() for p in first["end"].values()])
    assert not torch.equal(ends, ends.bfloat16().float())


NOISE, BOUND, LR = 1.5, 0.7, 0.3


def within_three_per_cent(values, std):
    # The standard error of a standard deviation of 41,000 values is 0.35 %.
    return abs(float(values.std()) / std - 1) < 0.03 and abs(float(values.mean())) < 0.03 * std


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_that_of_one_process_and_independent_in_every_shard(size):
    first = found(size)[0]["noise"]
    moved = {n: torch.tensor(p) - torch.tensor(first["start"][n]) for n, p in first["end"].items()}
    values, std = torch.cat([m.flatten() for m in moved.values()]), LR * NOISE * BOUND / 12
    assert within_three_per_cent(values, std)
    assert not within_three_per_cent(values * math.sqrt(2), std), "noise of every process would not be seen"
    assert not within_three_per_cent(values / math.sqrt(2), std), "a share of the noise would not be seen"
    most = math.ceil(101 / size)
    shards = [
        torch.cat([moved[f"net.blocks.{k}.weight"][r * most :][: 101 - (size - 1) * most] for k in range(4)])
        for r in range(size)
    ]
    for one, other in [(shards[r], shards[s]) for r in range(size) for s in range(r)]:
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.06
    assert float(values[:303].std()) == pytest.approx(std, rel=0.2), "the first rows have noise of their own"
