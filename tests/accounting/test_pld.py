"""The optional accountant: what dp-accounting says by itself, on grids that are bounded."""

import math
import subprocess
import sys

import numpy as np
import pytest

from lightning_dp.accounting import Phase, PLDAccountant, RDPAccountant, resolve_accountant
from lightning_dp.accounting import pld as module
from lightning_dp.accounting.fallback import NumericsError
from lightning_dp.errors import PrivacyConfigurationError

from . import oracles


def epsilon(releases: oracles.Releases, delta: float) -> float:
    return PLDAccountant().epsilon([Phase(noise, rate, count) for rate, noise, count in releases], delta)


@pytest.mark.parametrize(("rate", "noise", "count", "delta", "pld", "prv"), oracles.GOLDEN)
def test_golden_values(rate, noise, count, delta, pld, prv):
    assert pld * (1 - 5e-4) <= epsilon([(rate, noise, count)], delta) <= pld * 1.002


def test_random_settings():
    for rate, noise, count, delta in oracles.random_settings(6, seed=7):
        truth = oracles.pld_epsilon([(rate, noise, count)], delta)
        assert truth * 0.999 - 1e-4 <= epsilon([(rate, noise, count)], delta) <= truth * 1.003 + 1e-3


def test_mixed_phases():
    phases = [(0.01, 1.0, 1000), (0.02, 1.2, 500), (0.04, 1.5, 250)]
    assert epsilon(phases[:2], 1e-5) == pytest.approx(2.6878, rel=2e-3)
    assert epsilon(phases, 1e-5) == epsilon(phases[::-1], 1e-5) == pytest.approx(3.4411, rel=2e-3)
    with_full = [(0.01, 1.0, 1000), (1.0, 20.0, 5), (1.0, 30.0, 5)]
    assert epsilon(with_full, 1e-5) == pytest.approx(oracles.pld_epsilon(with_full, 1e-5), rel=2e-3)


def test_full_batches_by_the_closed_form():
    assert oracles.gaussian_delta(math.sqrt(5) / 3, epsilon([(1.0, 3.0, 5)], 1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_every_grid_gives_an_upper_bound(monkeypatch):
    monkeypatch.setattr(module, "_EPSILON_SHARE", 1.0)
    phases = (Phase(1.0, 0.01, 1000),)
    values = [module.composed_epsilon.__wrapped__(phases, 1e-5, fineness)[0] for fineness in (20.0, 5.0, 1.0, 0.3)]
    assert 1.8282 <= values[0] < values[1] < values[2] <= values[3]


def test_small_points_budget_gives_a_coarser_grid(monkeypatch):
    """Points are bounded, whatever is asked for; the bound stays one."""
    phases = (Phase(0.5, 1e-3, 1000),)
    fine, had = module.composed_epsilon(phases, 1e-5, module.FINE)
    monkeypatch.setattr(module, "_MOST_POINTS", 2.0**11)
    coarse, less = module.composed_epsilon.__wrapped__(phases, 1e-5, module.FINE)
    assert less < had / 4
    assert coarse > fine


@pytest.mark.parametrize(
    ("rate", "noise", "count", "delta", "reason"),
    [(0.01, 1.0, 10, 1e-13, "delta is too small"), (0.01, 10.0, 10**6, 1e-9, "delta drowns in rounding")],
)
def test_refuses_what_floats_cannot_hold(rate, noise, count, delta, reason):
    phases = (Phase(noise, rate, count),)
    with pytest.raises(NumericsError, match=reason):
        module.pld_epsilon(phases, delta)
    assert PLDAccountant().epsilon(phases, delta) == RDPAccountant().epsilon(phases, delta)


def test_a_grid_spoilt_by_rounding_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "_MOST_EXCESS", -1.0)
    with pytest.raises(NumericsError, match="no grid is free of rounding"):
        module.pld_epsilon((Phase(1.25, 0.015, 77),), 1e-5)


def test_an_infinite_epsilon_is_noticed(monkeypatch):
    class Endless:
        def get_epsilon_for_delta(self, delta):
            return math.inf

    monkeypatch.setattr(module, "_composed", lambda phases, singles, delta: Endless())
    with pytest.raises(NumericsError, match="no finite epsilon"):
        module.pld_epsilon((Phase(1.25, 0.015, 78),), 1e-5)


# Each answers in seconds; a grid without bounds would take gigabytes and minutes.
EXTREMES = [
    (1e-6, 0.3, 1, 1e-7), (0.999, 0.3, 1000, 1e-5), (1.0, 1000.0, 10**6, 1e-5), (0.1, 1.0, 10**9, 1e-5),
    (0.5, 0.01, 10, 1e-5), (1 - 1e-9, 1.0, 10, 1e-5), (0.9999, 1.0, 10, 1e-5),
    *(pytest.param(*extreme, marks=pytest.mark.slow) for extreme in [
        (1e-6, 0.3, 10**6, 1e-7), (1e-6, 0.7, 10**6, 1e-7), (0.5, 100.0, 10**6, 1e-6), (0.01, 0.3, 10**6, 1e-6),
        (1e-4, 1000.0, 10**6, 1e-5), (0.01, 30.0, 10**6, 1e-6),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("rate", "noise", "count", "delta"), EXTREMES)
def test_extremes_answer(rate, noise, count, delta):
    value = epsilon([(rate, noise, count)], delta)
    assert 0 <= value <= RDPAccountant().epsilon([Phase(noise, rate, count)], delta)
    assert math.isfinite(value)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(module, "dp_accounting_installed", lambda: False)
    with pytest.raises(PrivacyConfigurationError, match=r'not installed.*pip install "lightning-dp\[pld\]".*"prv"'):
        resolve_accountant("pld")


def test_whether_the_library_is_there(monkeypatch):
    assert module.dp_accounting_installed()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not module.dp_accounting_installed()


@pytest.mark.slow
def test_the_library_is_not_imported_before_it_is_needed():
    code = (
        "import sys; from lightning_dp.accounting import *; import lightning_dp; cross_checked(PRVAccountant()); "
        "resolve_accountant('pld'); print('dp_accounting' in sys.modules); "
        "print(PLDAccountant().epsilon([Phase(1.0, 0.5, 1)], 1e-5) > 0, 'dp_accounting' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1)])
def test_numpy_values(value):
    assert PLDAccountant().epsilon([Phase(value, 0.25, np.int32(3))], np.float64(1e-5)) > 0
