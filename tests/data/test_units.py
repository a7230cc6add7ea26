"""Users as units: who is drawn, and which of their examples, against the distributions written down anew."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dp.data import ExampleUnits, UserUnits
from lightning_dp.noise import SecretRandom
from tests.data.test_poisson import DRAWS, N, logical_batches, passes, poisson

M = 3
COUNTS = [1 + user % 6 for user in range(N)]
"""Of 50 users, with one to six examples each."""
OWNER = np.random.default_rng(0).permutation([user for user in range(N) for _ in range(COUNTS[user])])
OWN = [np.flatnonzero(user == OWNER).tolist() for user in range(N)]


def collate(examples):
    return (torch.tensor(examples),)


def indices(**kwargs):
    return DataLoader(range(len(OWNER)), batch_size=5, collate_fn=collate, **kwargs)


def by_user(seed=0, units=None, **kwargs):
    """Yield the examples of every drawn user, draw by draw; every block of M rows is one user's."""
    data = indices()
    loader = poisson(units=units or UserUnits(OWNER, M), user=data, seed=seed, **kwargs)
    for (first,) in loader:
        chunk, rest = loader.take()
        blocks = [(first, chunk), *((other.data[0], other) for other in rest)]
        drawn = {}
        for rows, batch in blocks:
            assert len(rows) == M * batch.num_rows
            for block in rows.reshape(-1, M)[: batch.num_real].tolist():
                (owner,) = {int(OWNER[example]) for example in block}
                assert owner not in drawn
                drawn[owner] = block
        yield drawn


def inclusion(draws):
    rows = torch.zeros(DRAWS, N)
    for row, drawn in zip(rows, draws, strict=True):
        row[list(drawn)] = 1
    return rows


def choices_pass(draws):
    """Chi-square of how often every example is chosen, given how often its user is.

    Of k examples r are chosen more often than the others, each with probability r / k: r = m, or m mod k if k < m. The
    counts of one user add up, so k of them have k - 1 degrees of freedom, with the factor (k - 1) / k for the
    negative correlation of draws without replacement.
    """
    statistic = degrees = 0
    counts = np.zeros(len(OWNER))
    times = np.zeros(N)
    for drawn in draws:
        for user, block in drawn.items():
            times[user] += 1
            np.add.at(counts, block, 1)
    for user, own in enumerate(OWN):
        k = len(own)
        always, r = (0, M) if k >= M else divmod(M, k)
        p = r / k
        extra = counts[own] - always * times[user]
        if p in (0.0, 1.0):
            assert (extra == p * times[user]).all()
            continue
        variance = times[user] * p * (1 - p)
        statistic += ((extra - times[user] * p) ** 2).sum() / variance * (k - 1) / k
        degrees += k - 1
    return abs((statistic - degrees) / math.sqrt(2 * degrees)) < 3.5


@pytest.fixture(scope="module")
def draws():
    return list(by_user())


def test_users_are_drawn_independently_with_one_probability(draws):
    assert passes(inclusion(draws), 0.3)


def test_a_users_examples_are_chosen_uniformly(draws):
    assert choices_pass(draws)


def test_the_choice_is_made_anew_in_every_draw(draws):
    """Two choices of 3 out of 6 share 1.5 on average: hypergeometric, variance 9/6 * (1/2) * (3/5) = 0.45."""
    for user in (u for u in range(N) if COUNTS[u] == 6):
        blocks = [set(drawn[user]) for drawn in draws if user in drawn]
        shared = np.array([len(a & b) for a, b in pairwise(blocks)])
        assert abs(shared.mean() - 1.5) < 4 * math.sqrt(0.45 / len(shared))


def test_no_row_is_repeated_where_there_are_enough_and_all_are_used_where_not(draws):
    for drawn in draws[:200]:
        for user, block in drawn.items():
            times = sorted(block.count(example) for example in OWN[user])
            k = COUNTS[user]
            assert times == ([0] * (k - M) + [1] * M if k >= M else [M // k] * (k - M % k) + [M // k + 1] * (M % k))


def test_the_tests_reject_a_wrong_rate_sampling_of_examples_and_fixed_choices(draws):
    assert not passes(inclusion(by_user(q=0.33)), 0.3)
    # The rate by which examples would be drawn for as many rows: users with more of them come more often.
    examples = poisson(user=indices(), units=ExampleUnits(len(OWNER)), q=0.3 * N / len(OWNER) * M, physical=1000)
    rows = torch.zeros(DRAWS, N)
    for row, ids in zip(rows, logical_batches(examples), strict=True):
        row[OWNER[ids]] = 1
    assert not passes(rows, 0.3)
    assert not passes(rows, float(rows.mean()))

    class First(UserUnits):
        def examples_of(self, units, random=None):
            return super().examples_of(units)

    fixed = list(by_user(units=First(OWNER, M)))
    assert passes(inclusion(fixed), 0.3)
    assert not choices_pass(fixed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("physical", [1, 2, 7])
def test_a_user_is_in_one_physical_batch_with_all_rows(workers, physical):
    """`by_user` asserts that every block of rows is one user's, and that no user has two."""
    data = indices(num_workers=workers)
    loader = poisson(q=0.9, num_batches=3, physical=physical, units=UserUnits(OWNER, M), user=data)
    for (first,) in loader:
        chunk, rest = loader.take()
        parts = [(first, chunk), *((other.data[0], other) for other in rest)]
        assert all(len(rows) == M * batch.num_rows <= M * physical for rows, batch in parts)
        owners = torch.from_numpy(OWNER)[torch.cat([rows for rows, _ in parts])].reshape(-1, M)
        assert (owners == owners[:, :1]).all()
        assert len(owners[:, 0].unique()) == len(owners) == sum(batch.num_real for _, batch in parts)


def test_an_empty_draw_is_one_phantom_user():
    loader = poisson(q=1e-9, num_batches=2, units=UserUnits(OWNER, M), user=indices())
    for (rows,) in loader:
        chunk, rest = loader.take()
        assert (len(rows), chunk.num_rows, chunk.num_real, list(rest)) == (M, 1, 0, [])


def test_phantoms_that_hide_the_size_repeat_the_drawn_users():
    data = indices()
    loader = poisson(num_batches=20, physical=N, constant_size=True, units=UserUnits(OWNER, M), user=data)
    for (rows,) in loader:
        chunk, _ = loader.take()
        assert len(rows) == M * N
        assert chunk.num_rows == N
        drawn = rows[: M * chunk.num_real]
        torch.testing.assert_close(rows, drawn.repeat(N)[: M * N])


def test_a_batch_to_look_at_has_the_same_rows_every_time():
    units = UserUnits(OWNER, M)
    loader = poisson(units=units, user=indices())
    (first,), (again,) = loader.batch_of([7, 7, 20]), loader.batch_of([7, 7, 20])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert OWNER[first].tolist() == [7] * 6 + [20] * 3


@pytest.mark.parametrize("numbers", [[5, 5, 5], [-3, 8, -3, 8], [10**15, 2, 10**15]])
def test_users_are_counted_whatever_their_numbers(numbers):
    units = UserUnits(np.array(numbers), 1)
    assert units.num_units == len(set(numbers))
    owners = [{numbers[i] for i in units.examples_of([unit] * 10, SecretRandom())} for unit in range(units.num_units)]
    assert owners == [{number} for number in sorted(set(numbers))]
