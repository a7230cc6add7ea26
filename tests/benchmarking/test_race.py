"""Processes that take turns, and what becomes of those that die."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_dp.benchmarking import Race
from lightning_dp.benchmarking import child as child_module
from lightning_dp.benchmarking.child import BenchmarkError, _failure
from lightning_dp.errors import PrivacyConfigurationError
from tests.benchmarking.made_up import FACTS
from tests.benchmarking.trainings import Turns, ends_at_once


@pytest.fixture
def quick(monkeypatch):
    """Forked processes need no imports; nothing in them computes."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    monkeypatch.setattr(child_module, "get_context", lambda _: multiprocessing.get_context("fork"))


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_trainings_take_turns_and_only_steps_after_the_warmup_count(quick, tmp_path):
    file = tmp_path / "turns"
    with Race(warmup=2) as race:
        assert race.start("a", Turns("a", file)) == FACTS
        race.start("b", Turns("b", file))
        rows = race.run(3)
    assert race.turns == ["a", "a", "b", "b", *["a", "b"] * 3]
    # What a training wrote in its turn is there before the next one began.
    assert file.read_text().split("\n")[::2][:-1] == [f"{name} begins" for name in race.turns]
    assert [row.name for row in rows] == ["a", "b"]
    for row in rows:
        assert row.facts == FACTS
        assert [(s.physical_batches, s.examples) for s in row.steps] == [(8, 33), (8, 34), (8, 35)]
        assert all(s.seconds > 0 for s in row.steps)
        assert row.memory.peak > row.memory.level > 0
        assert not row.note


DEATHS = {
    "raises": "(?s)a: failed.*Traceback.*in raises.*ZeroDivisionError: the training has a mistake",
    "exits": "a: the process ended with exit status 3",
    "ends_with_status_2": "a: ended with exit status 2",
}


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("how", DEATHS)
def test_a_training_that_dies_is_an_error_with_its_traceback(quick, how, step, tmp_path):
    def measure():
        with Race(warmup=1) as race:
            race.start("a", Turns("a", tmp_path / "turns", step, how))
            race.run(3)

    with pytest.raises(BenchmarkError, match=DEATHS[how]):
        measure()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("how", ["needs_too_much", "is_killed"])
def test_a_training_without_enough_memory_is_left_out_and_the_others_go_on(quick, how, step, tmp_path):
    with Race(warmup=1) as race:
        race.start("large", Turns("large", tmp_path / "turns", step, how))
        race.start("small", Turns("small", tmp_path / "turns"))
        large, small = race.run(3)
    # What the others hold counts, too: it was alone in its warm-up only.
    note = "out of memory" if step == 0 else "out of memory, beside 1 more"
    assert (large.note, large.steps, large.memory) == (note, (), None)
    assert (small.note, len(small.steps)) == ("", 3)
    assert large.facts == FACTS  # it was ready before it ran out of memory


def test_the_others_go_on_without_a_training_that_failed_at_its_start(quick, tmp_path):
    with Race(warmup=1) as race:
        race.start("a", Turns("a", tmp_path / "turns"))
        with pytest.raises(BenchmarkError, match="ZeroDivisionError"):
            race.start("b", Turns("b", tmp_path / "turns", 0, "raises"))
        a, b = race.run(2)
    assert (a.note, len(a.steps)) == ("", 2)
    assert (b.note, b.steps) == ("failed", ())


def test_a_training_that_ends_too_early_is_an_error(quick):
    with Race(warmup=1) as race, pytest.raises(BenchmarkError, match="a: the training ended before it was told to"):
        race.start("a", ends_at_once)


def test_a_token_for_a_process_that_is_gone_is_an_error(quick, tmp_path):
    with Race(warmup=1) as race:
        race.start("a", Turns("a", tmp_path / "turns"))
        (process,) = multiprocessing.active_children()
        process.terminate()
        process.join()
        with pytest.raises(BenchmarkError, match="a: the process ended with exit status -15 before its last step"):
            race.run(1)


def test_what_the_library_refuses_is_said_without_a_traceback():
    assert _failure(PrivacyConfigurationError("target_epsilon=-1: expected ...")).reason == (
        "target_epsilon=-1: expected ..."
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not agree"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert _failure(error).out_of_memory == expected


@pytest.mark.slow
def test_real_processes_end_with_whoever_started_them(tmp_path):
    """A kill leaves no time to clean up; the trainings notice that the connection is gone."""
    script = (
        "import multiprocessing, pathlib, time\n"
        "from lightning_dp.benchmarking import Race\n"
        "from tests.benchmarking.trainings import Turns\n"
        "if __name__ == '__main__':\n"
        "    race = Race(warmup=1)\n"
        f"    race.start('a', Turns('a', pathlib.Path({str(tmp_path / 'turns')!r})))\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "main.py").write_text(script)
    command = [sys.executable, str(tmp_path / "main.py")]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root}) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    gone = Path(f"/proc/{child}/cmdline")
    for _ in range(100):
        if not gone.exists() or not gone.read_bytes():
            break
        time.sleep(0.1)
    assert not gone.exists() or not gone.read_bytes()
