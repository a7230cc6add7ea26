"""The cases all accountants answer alike."""

import math

import pytest

from lightning_dp.accounting import Phase, PRVAccountant, RDPAccountant, resolve_accountant
from lightning_dp.errors import PrivacyConfigurationError

ACCOUNTANTS = [PRVAccountant(), RDPAccountant()]


@pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda a: a.name)
def test_edges(accountant):
    assert accountant.epsilon([], 1e-5) == 0
    assert accountant.epsilon([Phase(0.0, 0.1, 0), Phase(1.0, 0.1, 0)], 1e-5) == 0
    assert accountant.epsilon([Phase(0.0, 0.1, 1), Phase(1.0, 0.1, 5)], 1e-5) == math.inf
    # Whether the example was ever sampled is less probable than delta.
    assert accountant.epsilon([Phase(0.5, 1e-7, 10)], 1e-5) == 0


@pytest.mark.parametrize("accountant", ACCOUNTANTS, ids=lambda a: a.name)
@pytest.mark.parametrize("delta", [0, 1, -0.1, 2, math.nan, "1e-5", None, True])
def test_bad_delta(accountant, delta):
    with pytest.raises(PrivacyConfigurationError, match=r"delta=.*expected a probability in \(0, 1\)"):
        accountant.epsilon([Phase(1.0, 0.1, 1)], delta)


def test_resolve():
    assert isinstance(resolve_accountant("prv"), PRVAccountant)
    assert isinstance(resolve_accountant("rdp"), RDPAccountant)
    assert resolve_accountant(ACCOUNTANTS[0]) is ACCOUNTANTS[0]


@pytest.mark.parametrize("name", ["moments", "PRV", "", None, 3])
def test_unknown_accountant(name):
    with pytest.raises(
        PrivacyConfigurationError, match=f'accountant={name!r}: expected "prv", "rdp", "pld" or "rdp_filter"'
    ):
        resolve_accountant(name)
