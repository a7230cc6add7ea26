"""The stream of public batches: it has no end, and goes on where it was."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_dp.data import PublicStream
from lightning_dp.errors import PrivacyConfigurationError

N = 7


def numbers():
    return TensorDataset(torch.arange(N))


def taken(stream, count):
    return [batch[0].tolist() for batch in itertools.islice(stream, count)]


class Stateful(DataLoader):
    """Knows its own place, and notes what it fetches."""

    def __init__(self):
        super().__init__(numbers(), batch_size=2)
        self.at, self.fetched = 0, []

    def __iter__(self):
        while self.at < N:
            self.fetched.append(self.at)
            self.at += 1
            yield [torch.tensor([self.at - 1])]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
def test_a_resumed_stream_goes_on(after, workers):
    def stream():
        return PublicStream(DataLoader(numbers(), batch_size=2, shuffle=True, num_workers=workers))

    torch.manual_seed(0)
    whole, first = stream(), stream()
    expected = taken(whole, 9)
    torch.manual_seed(0)
    begun = taken(first, after)
    torch.manual_seed(5)
    again = stream()
    if after:
        again.load_state_dict(first.state_dict())
        assert begun + taken(again, 9 - after) == expected
    passes = [sum(expected[k : k + 4], []) for k in (0, 4)]
    assert all(sorted(part) == list(range(N)) for part in passes)
    assert passes[0] != passes[1]


def test_global_random_numbers_are_left_alone():
    stream = PublicStream(DataLoader(numbers(), batch_size=2, shuffle=True))
    next(stream)
    state = torch.get_rng_state()
    taken(stream, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_samplers_are_told_the_pass():
    sampler = DistributedSampler(numbers(), num_replicas=1, rank=0)
    stream = PublicStream(DataLoader(numbers(), batch_size=N, sampler=sampler))
    found = taken(stream, 3)
    for number, order in enumerate(found):
        sampler.set_epoch(number)
        assert order == list(sampler)
    assert len({tuple(order) for order in found}) == 3


def test_a_loader_that_knows_its_place_is_asked():
    first, second = Stateful(), Stateful()
    stream, again = PublicStream(first), PublicStream(second)
    assert taken(stream, 3) == [[0], [1], [2]]
    again.load_state_dict(stream.state_dict())
    assert again.state_dict()["loader"] == {"at": 3}  # not begun yet
    assert taken(again, 6) == [[3], [4], [5], [6], [0], [1]]
    assert second.fetched[0] == 3


def test_a_pass_without_a_batch():
    stream = PublicStream(DataLoader(numbers(), batch_size=N + 1, drop_last=True))
    with pytest.raises(PrivacyConfigurationError, match="the public dataloader has no batch"):
        next(stream)
