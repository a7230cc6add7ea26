"""SIGTERM, as a machine or a job that is taken away gets it: all processes end after the same release."""

import os
import signal

import pytest
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from lightning_dp.processes import Processes
from lightning_dp.strategies.signals import HeldSignals
from tests.processes import fits, signals
from tests.processes.world import run


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_all_processes_end_after_the_same_release_whoever_has_got_the_signal(ranks, tmp_path):
    found = run(2, signals.ended, str(tmp_path), ranks)
    steps = signals.STEP + 1  # that in which it came
    assert found == [("ended", steps, steps, True)] * 2
    ((noise, rate, count),) = signals.resumed(str(tmp_path))
    assert (noise, rate, count) == (fits.RESUMED_NOISE, pytest.approx(4 / fits.RESUMED_N), 6)


@pytest.mark.parametrize(("where", "steps"), [("start", 1), ("validation", signals.STEP), ("end", 5)])
def test_a_signal_between_releases_ends_all_processes(where, steps, tmp_path):
    """After the release that follows, by which the others hear of it; at the end of the validation, or of the fit."""
    assert run(2, signals.ended, str(tmp_path), (1,), where) == [("ended", steps, steps, True)] * 2


class Several(Processes):
    """Hears what this process notes."""

    size = 2

    def __init__(self):
        self.noted = []

    def note(self, number):
        self.noted.append(number)

    def heard(self):
        heard, self.noted = self.noted, []
        return heard


@pytest.fixture
def called():
    """What Lightning's handler of a signal was called with."""
    before, called = signal.getsignal(signal.SIGUSR2), []
    signal.signal(signal.SIGUSR2, _HandlersCompose([lambda number, frame: called.append(number)]))
    yield called
    signal.signal(signal.SIGUSR2, before)


def test_a_signal_is_held_back_until_all_have_heard(called):
    held, processes, lightnings = HeldSignals(), Several(), signal.getsignal(signal.SIGUSR2)
    for _ in range(2):  # both dataloaders of a fit
        held.hold(processes)
    signal.raise_signal(signal.SIGUSR2)
    assert (called, processes.noted) == ([], [signal.SIGUSR2])
    held.handle()
    assert called == [signal.SIGUSR2]
    held.let_go()
    assert signal.getsignal(signal.SIGUSR2) is lightnings


def test_one_process_alone_holds_nothing_back(called):
    HeldSignals().hold(Processes())
    signal.raise_signal(signal.SIGUSR2)
    assert called == [signal.SIGUSR2]


def test_a_process_that_was_forked_from_a_fit_gets_its_signals_at_once(called, monkeypatch):
    held, processes, own = HeldSignals(), Several(), os.getpid()
    held.hold(processes)
    monkeypatch.setattr(os, "getpid", lambda: own + 1)
    signal.raise_signal(signal.SIGUSR2)
    assert (called, processes.noted) == ([signal.SIGUSR2], [])
    held.let_go()


def test_a_handler_that_was_put_there_meanwhile_stays(called):
    held, users = HeldSignals(), signal.SIG_IGN
    held.hold(Several())
    signal.signal(signal.SIGUSR2, users)
    held.let_go()
    assert signal.getsignal(signal.SIGUSR2) == users


def test_a_signal_that_all_processes_get_one_after_the_other_is_handled_once_in_a_fit(called):
    held, processes = HeldSignals(), Several()
    for fits_so_far in (1, 2):
        held.hold(processes)
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR2)
            assert held.handle()
        assert not held.handle()
        held.let_go()
        assert called == [signal.SIGUSR2] * fits_so_far
