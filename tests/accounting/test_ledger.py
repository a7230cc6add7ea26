"""The ledger never forgets: checked against a plain count of every release made."""

import copy
import json
import math
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, Phase, Release
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError

KINDS = [(1.0, 0.1), (0.5, 0.1), (1.0, 1.0)]
# Two processes, each booking, and loading what the other (or itself) saved at some time before.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("book"), st.integers(0, 1), st.sampled_from(KINDS)),
        st.tuples(st.just("save"), st.integers(0, 1), st.none()),
        st.tuples(st.just("load"), st.integers(0, 1), st.integers(0, 20)),
    ),
    max_size=40,
)


def book(ledger: Ledger, count: int, kind: tuple[float, float] = KINDS[0]) -> Ledger:
    for _ in range(count):
        ledger.book(Release(*kind))
    return ledger


def total(ledger: Ledger) -> dict[tuple[float, float], int]:
    return {phase.kind: phase.num_releases for phase in ledger.phases}


def test_empty():
    assert Ledger().num_releases == 0
    assert Ledger().phases == ()


def test_counts_by_kind():
    ledger = book(book(book(Ledger(), 2), 1, KINDS[1]), 3)
    assert ledger.num_releases == 6
    assert ledger.phases == (Phase(1.0, 0.1, 5), Phase(0.5, 0.1, 1))


def test_checkpoint_in_a_fresh_process():
    saved = json.loads(json.dumps(book(Ledger(), 4).state_dict()))
    fresh = Ledger()
    fresh.merge(saved)
    assert book(fresh, 3).num_releases == 7


def test_older_checkpoint_in_the_same_process_loses_nothing():
    ledger = book(Ledger(), 4)
    saved = ledger.state_dict()
    book(ledger, 5)
    ledger.merge(saved)
    assert book(ledger, 1).num_releases == 10


def test_state_does_not_change_with_the_ledger():
    ledger = book(Ledger(), 1)
    saved = ledger.state_dict()
    book(ledger, 1)
    fresh = Ledger()
    fresh.merge(saved)
    assert fresh.num_releases == 1


@given(ACTIONS)
@settings(deadline=None, derandomize=True)
def test_two_processes_against_sets_of_releases(actions):
    """Oracle: every release has a name; a process knows those it made and those in what it loaded."""
    ledgers, known, saved, made = [Ledger(), Ledger()], [set(), set()], [], 0
    for action, who, what in actions:
        before = ledgers[who].num_releases
        if action == "book":
            ledgers[who].book(Release(*what))
            known[who].add((made, what))
            made += 1
        elif action == "save":
            saved.append((json.dumps(ledgers[who].state_dict()), set(known[who])))
        elif saved:
            state, releases = saved[what % len(saved)]
            ledgers[who].merge(json.loads(state))
            known[who] |= releases
        assert ledgers[who].num_releases >= before
    for ledger, releases in zip(ledgers, known, strict=True):
        assert ledger.num_releases == len(releases)
        for kind in KINDS:
            assert total(ledger).get(kind, 0) == sum(release[1] == kind for release in releases)


STATES = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0]), st.just(0.1), st.integers(0, 9)).map(
            lambda row: Release(*row[:2]).as_row(row[2])
        ),
        max_size=3,
    ),
    max_size=3,
).map(lambda segments: {"version": 2, "segments": segments})


@given(st.lists(STATES, max_size=4), st.randoms())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_merging_commutes_and_is_idempotent(states, random):
    first, second = Ledger(), Ledger()
    for state in states:
        first.merge(state)
    shuffled = states * 2
    random.shuffle(shuffled)
    for state in shuffled:
        second.merge(state)
    assert total(first) == total(second)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_separately(duplicate):
    """Both make releases after the copy; a ledger that meets both counts all of them."""
    ledger = book(Ledger(), 4)
    twin = duplicate(ledger)
    book(ledger, 2)
    book(twin, 3)
    assert (ledger.num_releases, twin.num_releases) == (6, 7)
    ledger.merge(twin.state_dict())
    assert ledger.num_releases == 9


def test_forked_process_goes_on_separately(monkeypatch):
    ledger = book(Ledger(), 2)
    before = ledger.own_segment
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert ledger.own_segment != before
    assert book(ledger, 1).num_releases == 3


@pytest.mark.parametrize("kind", [(-1.0, 0.1), (math.nan, 0.1), (1.0, 0.0)])
def test_bad_release(kind):
    with pytest.raises(PrivacyConfigurationError, match="expected"):
        Release(*kind)


ROW = Release(1.0, 0.1).as_row(3)


def rows(*rows):
    return {"version": 2, "segments": {"a": list(rows)}}


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (None, r"no privacy ledger: None has no 'version'"),
        ({}, r"no privacy ledger: \{\} has no 'version'"),
        ({"version": 1, "segments": {}}, r"version 1; this library reads version 2"),
        ({"version": 2}, r"segments=None, expected a mapping"),
        ({"version": 2, "segments": [1]}, r"segments=\[1\], expected a mapping"),
        ({"version": 2, "segments": {3: []}}, r"segment id 3, expected a string"),
        ({"version": 2, "segments": {"": []}}, r"segment id '', expected a string"),
        ({"version": 2, "segments": {"a": 5}}, r"segment 'a' is 5, expected a list"),
        (rows([1.0, 0.1]), r"segment 'a' is \[\[1.0, 0.1\]\], expected a list .*expected a mapping with the keys"),
        (rows({**ROW, "num_releases": -3}), r"num_releases=-3: expected an integer >= 0"),
        (rows({**ROW, "noise_multiplier": math.nan}), r"noise_multiplier=nan: expected"),
        (rows({**ROW, "extra": 1}), r"expected a mapping with the keys \['noise_multiplier', 'num_releases'"),
        (rows({**ROW, "unit": "patient"}), r"unit='patient': expected 'example' or 'user'"),
        (rows({**ROW, "sampling": "shuffle"}), r"sampling='shuffle': expected 'poisson'"),
        (rows({**ROW, "partition": 7}), r"partition=7: expected a name, or None"),
        (rows({**ROW, "num_units": 1.5}), r"num_units=1.5: expected an integer >= 0"),
        (rows(*[ROW] * 50, 7), r"\.\.\., expected a list"),
    ],
)
def test_malformed_states(state, found):
    ledger = book(Ledger(), 2)
    with pytest.raises(PrivacyError, match=found):
        ledger.merge(state)
    assert ledger.num_releases == 2


A, B = Release(1.0, 0.1, 50, partition="a"), Release(2.0, 0.2, 70, partition="b")
ALL = Release(3.0, 0.3, 90)


def test_a_unit_takes_part_in_one_partition_and_in_all_that_is_not_parted():
    ledger = Ledger()
    for release, count in [(A, 2), (B, 3), (ALL, 4)]:
        for _ in range(count):
            ledger.book(release)
    assert set(map(frozenset, ledger.histories())) == {
        frozenset({Phase(1.0, 0.1, 2), Phase(3.0, 0.3, 4)}),
        frozenset({Phase(2.0, 0.2, 3), Phase(3.0, 0.3, 4)}),
    }
    assert Phase(1.0, 0.1, 7) in ledger.histories({A: 5})[0]
    assert ledger.num_releases == 9
    assert ledger.counts == {A: 2, B: 3, ALL: 4}


def test_without_partitions_all_releases_compose():
    ledger = Ledger()
    assert ledger.histories() == ((),)
    ledger.book(Release(1.0, 0.1, 50))
    ledger.book(Release(1.0, 0.1, 60))
    assert ledger.histories() == ((Phase(1.0, 0.1, 2),),)
    assert len(ledger.counts) == 2


def test_totals_go_with_the_segments():
    """The totals that are kept, against sums over what is saved."""
    ledger, other = book(Ledger(), 2), book(Ledger(), 3, KINDS[1])
    before = ledger.revision
    book(ledger, 1, KINDS[2])
    assert ledger.revision == before
    ledger.merge(other.state_dict())
    assert ledger.revision > before
    book(other, 4)
    ledger.merge(other.state_dict())
    for one in (ledger, copy.deepcopy(ledger)):
        sums = {name: sum(row["num_releases"] for row in rows) for name, rows in one.state_dict()["segments"].items()}
        assert {name: one.num_of(name) for name in sums} == sums
        assert (one.num_releases, one.num_own) == (sum(sums.values()), sums[one.own_segment])
    assert (ledger.num_own, ledger.num_of("nobody")) == (3, 0)
