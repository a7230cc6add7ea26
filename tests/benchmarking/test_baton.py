"""The words between a training and the race, in one process and by a clock of its own."""

from multiprocessing import Pipe

import pytest

from lightning_dp.benchmarking.baton import Baton, Ended, Facts, Finished, Step, Token
from lightning_dp.benchmarking.memory import Memory
from tests.benchmarking.made_up import FACTS


def heard(connection):
    messages = []
    while connection.poll():
        messages.append(connection.recv())
    return messages


def test_a_step_lasts_from_its_turn_to_the_next_wait():
    here, there = Pipe()
    times = iter([10.0, 12.5, 100.0, 101.0])
    sizes = iter([4, 3])
    baton = Baton(there, clock=lambda: next(times))
    for token in (Token.STEP, Token.RESET, Token.STEP, Token.END):
        here.send(token)
    baton.imports_done()
    # A physical batch size may be another after the warm-up.
    baton.ready(lambda: Facts("cpu", next(sizes, 2), 1, 1, 1))
    baton.wait()
    baton.wait(8, 30)
    with pytest.raises(Ended):
        baton.wait(7, 28)
    facts, first, again, second, last = heard(here)
    assert (facts.physical_batch_size, again.physical_batch_size) == (3, 2)
    assert (first, second) == (Step(2.5, 8, 30), Step(1.0, 7, 28))
    assert isinstance(last, Finished)
    assert isinstance(last.memory, Memory)
    assert baton.has_ended


def test_a_training_ends_when_nobody_is_there_to_give_it_its_turn():
    here, there = Pipe()
    baton = Baton(there)
    baton.ready(lambda: FACTS)
    here.close()
    with pytest.raises(Ended):
        baton.wait()
    assert baton.has_ended


def test_a_gpu_has_computed_before_the_clock_is_read(monkeypatch):
    here, there = Pipe()
    done = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: done.append(str(device)))
    baton = Baton(there, clock=lambda: float(len(done)))
    baton.ready(lambda: Facts("cuda:0", 1, 1, 1, 1))
    here.send(Token.STEP)
    here.send(Token.STEP)
    baton.wait()
    baton.wait(1, 1)
    assert heard(here)[1] == Step(1.0, 1, 1)
    assert done == ["cuda:0"] * 3
