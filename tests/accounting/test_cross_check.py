"""A second opinion: both values, the larger counts, and a disagreement is said aloud."""

import logging
import math

import pytest

from lightning_dp.accounting import (
    CrossChecked,
    Phase,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    RDPFilter,
    cross_check,
    cross_checked,
    fallback,
)
from lightning_dp.accounting.fallback import NumericsError
from lightning_dp.errors import PrivacyConfigurationError

from . import oracles

PHASES = [Phase(1.0, 0.01, 1000)]


class Wrong(PRVAccountant):
    """The default accountant, a tenth below the truth."""

    def _epsilon(self, phases, delta):
        return 0.9 * super()._epsilon(phases, delta)


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(fallback, "_said", set())
    with caplog.at_level(logging.INFO, logger="lightning_dp"):
        yield caplog


@pytest.mark.parametrize("row", [oracles.GOLDEN[index] for index in (0, 4, 7, 9, 11)])
def test_both_values(row, log):
    rate, noise, count, delta, pld, _ = row
    checked, phases = cross_checked(PRVAccountant()), [Phase(noise, rate, count)]
    values = checked.values(phases, delta)
    assert list(values) == ["prv", "pld"]
    assert pld * (1 - 3e-5) <= values["pld"] <= pld * 1.003
    assert checked.epsilon(phases, delta) == max(values.values()) == PRVAccountant().epsilon(phases, delta)
    assert isinstance(checked.trusted(phases, delta), PRVAccountant)
    assert log.records == []


def test_the_larger_one_counts_and_a_disagreement_is_said(log):
    checked = cross_checked(Wrong())
    values = checked.values(PHASES, 1e-5)
    assert 1.8282 <= checked.epsilon(PHASES, 1e-5) == values["pld"] <= 1.003 * 1.8282
    assert isinstance(checked.trusted(PHASES, 1e-5), PLDAccountant)
    assert [record.levelname for record in log.records] == ["WARNING"]
    assert f'"prv" says {values["prv"]:.6g} and "pld" {values["pld"]:.6g}' in log.text


def test_without_the_library(log, monkeypatch):
    monkeypatch.setattr(cross_check, "dp_accounting_installed", lambda: False)
    checked = cross_checked(Wrong())
    assert not checked.checked
    assert checked.values(PHASES, 1e-5) == {"prv": Wrong().epsilon(PHASES, 1e-5)}
    assert isinstance(checked.trusted(PHASES, 1e-5), Wrong)
    assert "not checked by a second one: dp-accounting is not installed" in log.text


def test_where_the_second_fails(log, monkeypatch):
    def fail(phases, delta, fineness):
        raise NumericsError("planted")

    monkeypatch.setattr(cross_check, "composed_epsilon", fail)
    assert list(cross_checked(PRVAccountant()).values(PHASES, 1e-5)) == ["prv"]
    assert "not checked by a second one: planted" in log.text


def test_a_coarse_grid_is_no_opinion(log, monkeypatch):
    monkeypatch.setattr(cross_check, "composed_epsilon", lambda phases, delta, fineness: (9.0, 3.0))
    assert list(cross_checked(PRVAccountant()).values(PHASES, 1e-5)) == ["prv"]
    assert "only a coarse grid" in log.text


@pytest.mark.parametrize(
    "phases", [[], [Phase(1.0, 1.0, 5)], [Phase(0.5, 1e-7, 10)], [Phase(1.0, 0.1, 1), Phase(0.0, 0.1, 1)]]
)
def test_nothing_to_check(phases, log):
    values = cross_checked(PRVAccountant()).values(phases, 1e-5)
    assert values == {"prv": PRVAccountant().epsilon(phases, 1e-5)}
    assert log.records == []


@pytest.mark.parametrize("accountant", [RDPAccountant(), PLDAccountant(), RDPFilter(3.0)], ids=lambda a: a.name)
def test_others_are_passed_on(accountant, log):
    checked = cross_checked(accountant)
    assert (checked.name, checked.adaptive, checked.checked) == (accountant.name, accountant.adaptive, False)
    assert checked.values(PHASES, 1e-5) == {accountant.name: accountant.epsilon(PHASES, 1e-5)}
    assert log.records == []


def test_target_reaches_the_filter():
    checked = cross_checked(RDPFilter()).for_target(3.0, 1e-5)
    assert isinstance(checked, CrossChecked)
    assert checked.epsilon(PHASES, 1e-5) == RDPFilter().for_target(3.0, 1e-5).epsilon(PHASES, 1e-5)


def test_checking_twice_is_checking_once():
    checked = cross_checked(PRVAccountant())
    assert cross_checked(checked) is checked


@pytest.mark.parametrize("delta", [0, math.nan, "1e-5", True])
def test_bad_delta(delta):
    with pytest.raises(PrivacyConfigurationError, match="delta=.*expected a probability"):
        cross_checked(PRVAccountant()).values(PHASES, delta)
