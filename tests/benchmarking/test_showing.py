"""Tables, files and the command line."""

import json
import sys

import pytest

from lightning_dp import cli
from lightning_dp.benchmarking import command
from lightning_dp.benchmarking.child import BenchmarkError
from lightning_dp.benchmarking.fits import Variant
from lightning_dp.benchmarking.machine import Machine, this_machine
from lightning_dp.benchmarking.result import Results, Row, ratios_of
from lightning_dp.benchmarking.table import as_markdown, print_results, write_json
from tests.benchmarking.made_up import FACTS, row
from tests.test_cli import CONFIGS

MACHINE = Machine("host", "a processor", 2, None, "2.6", "2.5", "3.10", "2030-01-02T03:04:05+00:00")
NAMES = ("ordinary", "private", "ordinary bias-only", "private bias-only")


def results():
    rows = (
        row("ordinary", [1.0, 1.0, 1.0], peak=2**30, level=2**29),
        row("private", [1.25, 1.5, 1.5], peak=2**30 + 2**29, level=2**29),
        Row("ordinary bias-only", FACTS, (), None, "out of memory"),
    )
    return Results("a model", rows, ratios_of(rows, command.PAIRS), MACHINE)


def test_the_terminal_shows_every_row_and_ratio(capsys):
    print_results(results())
    lines = capsys.readouterr().out.splitlines()
    (private,) = [line.split() for line in lines if line.lstrip().startswith("private  ")]
    # 1.5 s for 32 examples is 187.5 ms for a physical batch of 4.
    assert private == ["private", "10", "1.5", "s", "188", "ms", "4", "1.50", "GiB", "1.00", "GiB"]
    (ratio,) = [line.split() for line in lines if line.lstrip().startswith("private / ordinary")]
    assert ratio == ["private", "/", "ordinary", "1.5", "1.38", "to", "1.5", "2"]
    assert any("out of memory" in line for line in lines)


def test_markdown_names_the_machine_and_has_the_same_cells():
    text = as_markdown(results())
    assert text.startswith("## a model\n\na processor, 2 cores; torch 2.6, lightning 2.5, Python 3.10; 2030-01-02\n")
    assert "| private | 10 | 1.5 s | 188 ms | 4 | 1.50 GiB | 1.00 GiB |" in text
    assert "| private / ordinary | 1.5 | 1.38 to 1.5 | 2 |" in text
    assert "| ordinary bias-only | 10 | out of memory | - | - | - | - |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {8, 5}


def test_a_table_of_nothing_says_nothing_of_medians():
    text = as_markdown(Results("a model", (Row("a", None, (), None, "failed"),), (), MACHINE))
    assert "| a | - | failed |" in text
    assert "Median" not in text


def test_json_has_every_step_and_the_machine(tmp_path):
    write_json([results()], tmp_path / "found.json")
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [step["seconds"] for step in found["rows"][1]["steps"]] == [1.25, 1.5, 1.5]
    assert found["machine"]["processor"] == "a processor"
    assert found["ratios"][0]["memory"] == 2.0


def test_the_machine_is_known(monkeypatch):
    here = this_machine("cpu")
    assert here.cores >= 1
    assert here.processor
    assert here.gpu is None
    monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so.2:libother.so")
    assert "; libjemalloc.so.2, libother.so; " in str(this_machine("cpu"))
    monkeypatch.delenv("LD_PRELOAD")
    assert "; ; " not in str(this_machine("cpu"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    assert str(this_machine("cuda")).startswith(f"a GPU ({here.processor}); torch ")
    monkeypatch.setattr(
        "lightning_dp.benchmarking.machine.Path",
        type("Absent", (), {"__init__": lambda *_: None, "read_text": _absent}),
    )
    assert this_machine("cpu").processor


def _absent(_):
    raise FileNotFoundError


# ---- the command ---------------------------------------------------------------------------------------------------


class FakeRace:
    """Starts nothing; every training takes as long as its place in the order."""

    started, facts = [], FACTS

    def __init__(self):
        FakeRace.started = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, name, training):
        self.started.append((name, training))
        return self.facts

    def run(self, rounds):
        return [row(name, [1.0 + k] * rounds) for k, (name, _) in enumerate(self.started)]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-dp", "benchmark", *arguments])
    cli.main()


def test_the_command_measures_four_trainings_of_the_given_arguments(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "Race", FakeRace)
    run(monkeypatch, "--config=x.yaml", "--steps=2", "--trainer.max_steps", "7", f"--json={tmp_path / 'found.json'}")
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert tuple(r["name"] for r in found["rows"]) == NAMES
    assert all(len(r["steps"]) == 2 for r in found["rows"])
    ratios = {(r["name"], r["other"]): r["time"] for r in found["ratios"]}
    # Started in the order private, ordinary, private bias-only, ordinary bias-only: 1, 2, 3 and 4 seconds.
    assert ratios == {NAMES[1::-1]: 1 / 2, NAMES[:1:-1]: 3 / 4, (NAMES[3], NAMES[0]): 3 / 2}
    trainings = dict(FakeRace.started)
    assert {t.arguments for t in trainings.values()} == {("--config=x.yaml", "--trainer.max_steps", "7")}
    private = trainings["private"].variant
    assert private.private
    assert trainings["ordinary"].variant == Variant(False, False, 4, 8, private.steps)
    assert trainings["ordinary bias-only"].variant.bias_only
    assert "private bias-only / ordinary" in capsys.readouterr().out


def test_a_training_that_fails_ends_the_command_with_its_message(monkeypatch):
    def fails(*_):
        raise BenchmarkError("private: failed.\n\nTraceback ...")

    monkeypatch.setattr(command, "measure_configuration", fails)
    with pytest.raises(SystemExit, match="(?s)lightning-dp benchmark: private: failed.*Traceback"):
        run(monkeypatch, "--config=x.yaml")


def test_no_opponent_is_known_of_a_training_that_never_was_ready(monkeypatch):
    monkeypatch.setattr(command, "Race", FakeRace)
    monkeypatch.setattr(FakeRace, "facts", None)
    with pytest.raises(SystemExit, match="private: out of memory before its first step"):
        run(monkeypatch, "--config=x.yaml")


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--steps=0", "argument --steps: 0, expected at least 1"), ("--json=no/where.json", "there is no directory 'no'")],
)
def test_a_mistake_ends_with_status_2_before_anything_is_measured(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure_configuration", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, argument)
    assert message in capsys.readouterr().err


def test_help_names_the_arguments_of_fit(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("--steps", "--json", "those of lightning-dp fit, such as --config"):
        assert text in printed


@pytest.mark.slow
def test_a_configuration_is_measured_in_real_processes(monkeypatch, tmp_path):
    arguments = ("--data.batch_size=128", "--trainer.strategy.max_physical_batch_size=32")
    run(monkeypatch, f"--config={CONFIGS[0]}", *arguments, "--steps=2", f"--json={tmp_path / 'found.json'}")
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert tuple(r["name"] for r in found["rows"]) == NAMES
    for measured in found["rows"]:
        assert (measured["facts"]["physical_batch_size"], measured["facts"]["num_physical"]) == (32, 4)
        assert len(measured["steps"]) == 2
        assert all(step["seconds"] > 0 and step["physical_batches"] >= 1 for step in measured["steps"])
        assert measured["memory"]["peak"] > measured["memory"]["level"]
    assert len(found["ratios"]) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.slow
def test_a_configuration_that_is_refused_says_why(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="private: a benchmark with trainer.strategy=auto: expected a private"):
        run(monkeypatch, f"--config={CONFIGS[0]}", "--trainer.strategy=auto", "--steps=1")
