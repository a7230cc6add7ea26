"""The cases all accountants answer alike."""

import math

import numpy as np
import pytest

from lightning_dp.accounting import (
    Accountant,
    Phase,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    RDPFilter,
    cross_checked,
    resolve_accountant,
)
from lightning_dp.accounting.base import coarsened
from lightning_dp.accounting.rdp import composed_divergences, conversion, divergences
from lightning_dp.errors import PrivacyConfigurationError

ACCOUNTANTS = [PRVAccountant(), RDPAccountant(), PLDAccountant(), RDPFilter(3.0), cross_checked(PRVAccountant())]


@pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda a: a.name)
def test_edges(accountant):
    assert accountant.epsilon([], 1e-5) == 0
    assert accountant.epsilon([Phase(0.0, 0.1, 0), Phase(1.0, 0.1, 0)], 1e-5) == 0
    assert accountant.epsilon([Phase(0.0, 0.1, 1), Phase(1.0, 0.1, 5)], 1e-5) == math.inf
    # Whether the example was ever sampled is less probable than delta.
    assert (accountant.epsilon([Phase(0.5, 1e-7, 10)], 1e-5) == 0) is not accountant.adaptive


@pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda a: a.name)
@pytest.mark.parametrize(
    "delta", [0, 1, -0.1, 2, math.nan, math.inf, "1e-5", None, True, np.bool_(True), np.float64(2)]
)
def test_bad_delta(accountant, delta):
    with pytest.raises(PrivacyConfigurationError, match=r"delta=.*expected a probability in \(0, 1\)"):
        accountant.epsilon([Phase(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize(("bound", "epsilon"), [(math.nan, math.inf), (math.inf, math.inf), (-1.0, 0.0), (2.0, 2.0)])
def test_what_is_no_number_is_no_bound(bound, epsilon):
    class Own(Accountant):
        name = "own"

        def _epsilon(self, phases, delta):
            return bound

    assert Own().epsilon([Phase(1.0, 0.1, 1)], 1e-5) == epsilon


def test_resolve():
    assert isinstance(resolve_accountant("prv"), PRVAccountant)
    assert isinstance(resolve_accountant("rdp"), RDPAccountant)
    assert isinstance(resolve_accountant("pld"), PLDAccountant)
    assert isinstance(resolve_accountant("rdp_filter"), RDPFilter)
    assert resolve_accountant(ACCOUNTANTS[0]) is ACCOUNTANTS[0]


@pytest.mark.parametrize("accountant", ACCOUNTANTS[:3], ids=lambda a: a.name)
def test_a_target_changes_nothing_but_for_a_filter(accountant):
    assert accountant.for_target(3.0, 1e-5) is accountant
    assert not accountant.adaptive


@pytest.mark.parametrize("accountant", [*ACCOUNTANTS, RDPFilter()], ids=lambda a: a.name)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "3", None, True, np.bool_(True)])
def test_bad_targets(accountant, value):
    with pytest.raises(PrivacyConfigurationError, match=r"target_epsilon=.*expected a finite number > 0"):
        accountant.for_target(value, 1e-5)
    with pytest.raises(PrivacyConfigurationError, match=r"delta=.*expected a probability in \(0, 1\)"):
        accountant.for_target(3.0, value)


@pytest.mark.parametrize("name", ["moments", "PRV", "", None, 3])
def test_unknown_accountant(name):
    with pytest.raises(
        PrivacyConfigurationError, match=f'accountant={name!r}: expected "prv", "rdp", "pld" or "rdp_filter"'
    ):
        resolve_accountant(name)


NOISES, RATES = np.geomspace(2, 1, 1000), np.geomspace(1e-2, 3e-2, 1000)
SCHEDULE = [Phase(float(z), float(q), 1) for z, q in zip(NOISES, RATES, strict=True)]


def count_worse(phases, noise: float, rate: float) -> int:
    """Releases with at most that noise and at least that rate."""
    return sum(p.num_releases for p in phases if p.noise_multiplier <= noise and p.sample_rate >= rate)


@pytest.mark.parametrize("most", [1, 2, 32, 256])
def test_coarsened(most):
    few = coarsened(SCHEDULE, most)
    assert len(few) <= most
    assert sum(phase.num_releases for phase in few) == len(SCHEDULE)
    for phase in SCHEDULE[::10]:
        assert count_worse(few, *phase.kind) >= count_worse(SCHEDULE, *phase.kind)


def test_few_kinds_stay_as_they_are():
    assert coarsened(SCHEDULE[:32], 32) == tuple(SCHEDULE[:32])


def test_a_longer_schedule_finds_the_same_kinds():
    kinds = [{phase.kind for phase in coarsened(SCHEDULE[:n], 32)} for n in (990, 1000)]
    assert len(kinds[0] - kinds[1]) <= 2


def test_coarsening_costs_little():
    """A schedule of very many kinds, against one of as many as are accounted for one by one."""
    phases = [Phase(float(z), 0.01, 10) for z in np.geomspace(2, 1, 48)]
    exact = np.sum([divergences(*phase.kind) * phase.num_releases for phase in phases], axis=0)
    least = float(np.min(exact + conversion(1e-5)))
    coarse = composed_divergences(coarsened(phases, 32))
    assert least <= float(np.min(coarse + conversion(1e-5))) <= 1.04 * least


@pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_noise_whose_square_is_no_float(accountant, rate):
    assert accountant.epsilon([Phase(1e-200, rate, 3)], 1e-5) == math.inf
    assert accountant.epsilon([Phase(1e160, rate, 3)], 1e-5) <= accountant.epsilon([Phase(1e90, rate, 3)], 1e-5) < 5
