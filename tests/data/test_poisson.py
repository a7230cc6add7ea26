"""Poisson sampling, against the Bernoulli distribution."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.data import ExampleUnits, PoissonLoader
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import SecretRandom, SharedRandom
from lightning_dp.processes import Processes

N, DRAWS = 50, 2000


class Known(SecretRandom):
    """The product's random numbers, from a seed that a test knows."""

    def __init__(self, seed):
        super().__init__()
        self._cpu = np.random.default_rng(seed)


def poisson(
    n=N,
    q=0.3,
    num_batches=DRAWS,
    physical=8,
    seed=0,
    constant_size=False,
    user=None,
    first_step=0,
    units=None,
    **kwargs,
):
    return PoissonLoader(
        user or DataLoader(TensorDataset(torch.arange(n)), batch_size=5, **kwargs),
        units or ExampleUnits(n),
        sample_rate=q if callable(q) else lambda step: q,
        first_step=lambda: first_step,
        num_batches=num_batches,
        max_physical_batch_size=physical,
        random=Known(seed),
        constant_size=constant_size,
    )


def logical_batches(loader):
    for (first,) in loader:
        chunk, rest = loader.take()
        ids = first[: chunk.num_real].tolist()
        for other in rest:
            ids += other.data[0][: other.num_real].tolist()
        yield ids


def inclusion(loader):
    rows = torch.zeros(DRAWS, N)
    for row, ids in zip(rows, logical_batches(loader), strict=True):
        assert len(ids) == len(set(ids))
        row[ids] = 1
    return rows


def upper_tail(observed, expected, variance, degrees):
    """The probability of a chi-square statistic at least as large."""
    return stats.chi2.sf(float(((observed - expected).square() / variance).sum()), degrees)


def passes(rows, q):
    """Chi-square of the inclusions per example and per draw, and of neighbouring examples and draws together."""
    assert DRAWS * q**2 >= 5, "too rare for the normal approximation"
    each = upper_tail(rows.sum(0), DRAWS * q, DRAWS * q * (1 - q), N)
    size = upper_tail(rows.sum(1), N * q, N * q * (1 - q), DRAWS)
    pairs = (rows[:, 1:] * rows[:, :-1]).sum(0)[::2]  # disjoint pairs of examples
    together = upper_tail(pairs, DRAWS * q**2, DRAWS * q**2 * (1 - q**2), len(pairs))
    steps = (rows[1:] * rows[:-1])[::2].sum(0)
    after = upper_tail(steps, DRAWS / 2 * q**2, DRAWS / 2 * q**2 * (1 - q**2), N)
    return all(2e-4 < p < 1 - 2e-4 for p in (each, size, together, after))


@pytest.mark.parametrize("q", [0.1, 0.3, 0.9])
def test_inclusion_is_bernoulli_and_independent(q):
    assert passes(inclusion(poisson(q=q)), q)


def test_the_test_rejects_a_wrong_rate_shuffling_and_repetition():
    rows = inclusion(poisson(q=0.33))
    assert not passes(rows, 0.3)
    g = torch.Generator().manual_seed(0)
    shuffled = torch.zeros(DRAWS, N)
    for row in shuffled:
        row[torch.randperm(N, generator=g)[: int(0.3 * N)]] = 1
    assert not passes(shuffled, 0.3)
    assert not passes(inclusion(poisson()).roll(0).repeat_interleave(2, 0)[:DRAWS], 0.3)


class Counting(Known):
    """Counts the random numbers that were asked for."""

    asked = 0

    def uniform(self, size):
        self.asked += size
        return super().uniform(size)


@pytest.mark.parametrize(("n", "q"), [(10**6, 1e-4), (10**9, 1e-8), (400, 0.01)])
def test_a_draw_of_few_among_many(n, q):
    """Sizes against the binomial distribution and places against the uniform one; the tests reject others."""
    random, draws = Counting(1), 2000
    loader = poisson(n=1, units=ExampleUnits(n), q=q)
    loader._random = random
    drawn = [loader.draw(q) for _ in range(draws)]
    assert all(units[0] >= 0 and units[-1] < n and units == sorted(set(units)) for units in drawn if units)
    assert random.asked < 4 * draws * (n * q + 10)

    def p_of_sizes(q):
        sizes = np.bincount([len(units) for units in drawn])
        expected = draws * stats.binom.pmf(np.arange(len(sizes)), n, q)
        common = expected >= 5
        return stats.chi2.sf((np.square(sizes - expected)[common] / expected[common]).sum(), common.sum())

    places = np.concatenate(drawn) / n
    assert p_of_sizes(q) > 1e-3
    assert p_of_sizes(1.2 * q) < 1e-3
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert stats.kstest(places, "beta", args=(1, 1.2)).pvalue < 1e-3


def test_rate_one_takes_every_example_each_time():
    assert all(sorted(ids) == list(range(N)) for ids in logical_batches(poisson(q=1.0, num_batches=3)))


def test_an_empty_draw_is_a_phantom_of_weight_zero():
    loader = poisson(q=1e-9, num_batches=2)
    for (first,) in loader:
        chunk, rest = loader.take()
        assert (len(first), chunk.num_rows, chunk.num_real, list(rest)) == (1, 1, 0, [])


def test_phantoms_that_hide_the_size_repeat_the_draw():
    loader = poisson(num_batches=50, physical=N, constant_size=True)
    for (rows,) in loader:
        chunk, _ = loader.take()
        drawn = rows[: chunk.num_real]
        assert len(rows) == chunk.num_rows == N
        assert drawn.unique().numel() == chunk.num_real < N
        torch.testing.assert_close(rows, drawn.repeat(N)[:N] if chunk.num_real else torch.zeros_like(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_batches_and_sizes_together(workers):
    loader = poisson(num_batches=20, num_workers=workers)
    loader_sizes = [len(ids) for ids in logical_batches(loader)]
    expected = [len(ids) for ids in (poisson(num_batches=20).draw(0.3) for _ in range(1))]
    assert loader_sizes[0] == expected[0]
    assert len(loader_sizes) == 20


def test_physical_batches_are_even_and_bounded():
    loader = poisson(q=1.0, num_batches=1, physical=8)
    sizes = []
    for _ in loader:
        chunk, rest = loader.take()
        sizes = [chunk.num_rows, *[other.num_rows for other in rest]]
    assert sum(sizes) == N
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1


def test_a_skipped_batch_does_not_mix_two_draws():
    loader = poisson(num_batches=6)
    same = poisson(num_batches=6)
    expected = list(logical_batches(same))
    found = []
    for k, (first,) in enumerate(loader):
        if k % 2:
            continue
        chunk, rest = loader.take()
        found.append(first[: chunk.num_real].tolist() + [i for o in rest for i in o.data[0].tolist()])
    assert found == expected[::2]


def test_one_draw_is_taken_once():
    loader = poisson()
    next(iter(loader))
    loader.take()
    with pytest.raises(PrivacyError, match="one draw of examples"):
        loader.take()


def test_an_epoch_can_be_broken_off_and_begun_again():
    loader = poisson(num_batches=5, physical=3)
    for k, _ in enumerate(loader):
        if k == 1:
            break
    assert len(list(logical_batches(loader))) == 5


def test_batch_of_uses_the_collate_function_on_copies():
    def collate(samples):
        return [s.pop() for s in samples]

    data = [[k] for k in range(4)]
    user = DataLoader(data, batch_size=2, collate_fn=collate)
    loader = poisson(4, user=user)
    assert loader.batch_of([0, 3, 3]) == [0, 3, 3]
    assert data == [[0], [1], [2], [3]]


def test_every_step_has_its_own_rate():
    """Step 7 on is drawn with certainty, the steps before with rate 0.1."""
    loader = poisson(q=lambda step: 1.0 if step >= 7 else 0.1, num_batches=10, first_step=5, physical=1000)
    drawn = []
    for _ in loader:
        chunk, _ = loader.take()
        drawn.append((chunk.step, chunk.sample_rate, chunk.num_real))
    assert [row[:2] for row in drawn] == [(step, 1.0 if step >= 7 else 0.1) for step in range(5, 15)]
    assert all((size == N) == (step >= 7) for step, _, size in drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_size_may_change_before_every_epoch(workers):
    data = poisson(num_batches=5, num_workers=workers)
    sizes, states = [2, 3], []

    def next_epoch():
        states.append(data._random._cpu.bit_generator.state)
        data.max_physical_batch_size = sizes[len(states) - 1]

    data.before_epoch = next_epoch
    for size in sizes:
        largest = 0
        for (first,) in data:
            _, others = data.take()
            largest = max([largest, len(first), *(len(other.data[0]) for other in others)])
        assert largest == size
    assert states[0] == Known(0)._cpu.bit_generator.state  # nothing was drawn before
    assert len(states) == 2


class OneOf(Processes):
    """One of several processes, all of which are simulated here: they know one key."""

    def __init__(self, rank, size, seed=0):
        self.rank, self.size = rank, size
        self._key = int(np.random.default_rng(seed).integers(2**62))

    def common_random(self, own):
        return lambda step: SharedRandom(self._key, step)


def joined(loader, process):
    loader._processes, loader._random_from = process, process.common_random(None)


def of_several(size, **settings):
    loaders = [poisson(seed=rank, **settings) for rank in range(size)]
    for rank, loader in enumerate(loaders):
        joined(loader, OneOf(rank, size))
    return loaders


def shares(loader):
    """The units of every logical batch, and in how many physical batches they came."""
    for (first,) in loader:
        chunk, rest = loader.take()
        parts = [(first, chunk.num_real), *((other.data[0], other.num_real) for other in rest)]
        yield [unit for rows, real in parts for unit in rows[:real].tolist()], len(parts)


@pytest.mark.parametrize(("size", "q"), [(2, 0.3), (7, 0.1)])
def test_what_several_processes_draw_together_is_one_poisson_sample(size, q):
    rows = torch.zeros(DRAWS, N)
    for row, parts in zip(rows, zip(*map(shares, of_several(size, q=q, physical=2)), strict=True), strict=True):
        units = [unit for its, _ in parts for unit in its]
        assert len(units) == len(set(units)), "a unit is in one logical batch twice"
        lengths = [len(its) for its, _ in parts]
        assert max(lengths) - min(lengths) <= 1
        assert {count for _, count in parts} == {max(1, math.ceil(max(lengths) / 2))}, "a process has more batches"
        row[units] = 1
    assert passes(rows, q)


def test_draws_with_keys_of_their_own_are_none():
    """The test of one Poisson sample rejects processes that do not draw alike."""
    loaders = of_several(2)
    for rank, loader in enumerate(loaders):
        joined(loader, OneOf(rank, 2, seed=rank))
    both = [unit for its in zip(*map(shares, loaders), strict=True) for unit in its[0][0] if unit in its[1][0]]
    assert both


def test_an_epoch_that_is_broken_off_leaves_the_next_one_alike_in_all_processes():
    """Whatever a process has fetched of an epoch before it is broken off."""
    loaders = of_several(2, num_batches=20)
    for loader, taken in zip(loaders, (3, 11), strict=True):
        for k, _ in enumerate(loader):
            if k == taken:
                break
    epochs = [list(shares(loader)) for loader in loaders]
    assert any(its for its, _ in epochs[0])
    for (mine, _), (other, _) in zip(*epochs, strict=True):
        assert not set(mine) & set(other)
        assert abs(len(mine) - len(other)) <= 1


def test_the_key_of_a_draw_cannot_be_copied():
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="secret: they cannot be copied or pickled"):
            take(SharedRandom(1))
