"""Planted failures: who is asked next, and what is said about it."""

import logging

import pytest

from lightning_dp.accounting import Phase, PLDAccountant, PRVAccountant, RDPAccountant, fallback, pld, prv
from lightning_dp.accounting.fallback import Engine, NumericsError, least_epsilon

PHASES = (Phase(1.0, 0.01, 1000),)


def fail(phases, delta):
    raise NumericsError("planted", f"{len(phases)} phase(s)")


def overflow(phases, delta):
    raise FloatingPointError("also planted")


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(fallback, "_said", set())
    caches = (prv._fallback_epsilon, pld._fallback_epsilon)
    for cache in caches:
        cache.cache_clear()
    with caplog.at_level(logging.INFO, logger="lightning_dp"):
        yield caplog
    for cache in caches:
        cache.cache_clear()


def test_nothing_is_said_where_nothing_fails(log):
    assert PRVAccountant().epsilon(PHASES, 1e-5) < RDPAccountant().epsilon(PHASES, 1e-5)
    assert log.records == []


@pytest.mark.parametrize("failure", [fail, overflow])
def test_prv_gives_way_to_pld(log, monkeypatch, failure):
    monkeypatch.setattr(prv, "prv_epsilon", failure)
    assert PRVAccountant().epsilon(PHASES, 1e-5) == PLDAccountant().epsilon(PHASES, 1e-5)
    assert [record.levelname for record in log.records] == ["WARNING"]
    assert '"prv" gave way to "pld"' in log.text
    assert "planted" in log.text


def test_prv_and_pld_give_way_to_rdp(log, monkeypatch):
    monkeypatch.setattr(prv, "prv_epsilon", fail)
    monkeypatch.setattr(prv, "pld_epsilon", overflow)
    assert PRVAccountant().epsilon(PHASES, 1e-5) == RDPAccountant().epsilon(PHASES, 1e-5)
    assert ['"prv" gave way to "rdp"' in log.messages[0], '"pld" gave way to "rdp"' in log.messages[1]] == [True, True]


def test_prv_gives_way_to_rdp_without_the_library(log, monkeypatch):
    monkeypatch.setattr(prv, "prv_epsilon", fail)
    monkeypatch.setattr(prv, "dp_accounting_installed", lambda: False)
    assert PRVAccountant().epsilon(PHASES, 1e-5) == RDPAccountant().epsilon(PHASES, 1e-5)
    assert len(log.records) == 1
    assert '"prv" gave way to "rdp"' in log.text


def test_pld_gives_way_to_rdp(log, monkeypatch):
    monkeypatch.setattr(pld, "pld_epsilon", fail)
    assert PLDAccountant().epsilon(PHASES, 1e-5) == RDPAccountant().epsilon(PHASES, 1e-5)
    assert '"pld" gave way to "rdp"' in log.text


def test_each_reason_is_said_once(log, monkeypatch):
    monkeypatch.setattr(prv, "prv_epsilon", fail)
    for count in (1, 2, 3):
        PRVAccountant().epsilon([Phase(1.0, 0.01, count)], 1e-5)
    assert len(log.records) == 1
    monkeypatch.setattr(prv, "prv_epsilon", overflow)
    PRVAccountant().epsilon([Phase(1.0, 0.01, 99)], 1e-5)
    assert len(log.records) == 2


def test_the_lesser_bound_is_named(log):
    """An engine may hold and still say more than the Renyi bound."""
    loose = Engine("loose", lambda phases, delta: 1e6)
    assert least_epsilon(PHASES, 1e-5, [Engine("bad", fail), loose]) == RDPAccountant().epsilon(PHASES, 1e-5)
    assert '"bad" gave way to "rdp"' in log.text


def test_other_errors_are_not_hidden(log):
    def interrupt(phases, delta):
        raise TypeError("a bug, no numerics")

    with pytest.raises(TypeError, match="a bug"):
        least_epsilon(PHASES, 1e-5, [Engine("bad", interrupt)])
