"""The named workloads: one command makes a table, in the terminal and in files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEED = ROOT / "examples" / "benchmarks" / "speed.py"
TINY = ["gpt2", "--layers=1", "--width=16", "--length=8", "--physical=1", "--steps=1"]


def speed(*arguments, **kwargs):
    command = [sys.executable, str(SPEED), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "--steps=0"], "argument --steps: 0, expected at least 1"),
        (["vit", "--sweep=length"], "argument --sweep: expected the workload gpt2"),
        ([*TINY, "--plot=x.png"], "argument --plot: expected --sweep"),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_said_before_anything_is_measured(arguments, message):
    ended = speed(*arguments, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr


@pytest.mark.slow
def test_a_sweep_makes_tables_and_a_picture(tmp_path):
    files = [f"--results={tmp_path / 'r.md'}", f"--json={tmp_path / 'r.json'}", f"--plot={tmp_path / 'r.png'}"]
    speed(*TINY, "--variants", "plain", "dp_bias", "--sweep=length", "--points", "4", "8", *files, check=True)
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [[row["name"] for row in results["rows"]] for results in found] == 2 * [["plain", "dp_bias"]]
    # By the tokens of a physical batch: twice as many examples of half the length.
    assert [results["rows"][0]["facts"]["physical_batch_size"] for results in found] == [2, 1]
    assert (tmp_path / "r.md").read_text().count("| dp_bias / plain |") == 2
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.slow
def test_peers_take_part(tmp_path):
    pytest.importorskip("opacus")
    names = ["plain_linear", "opacus", "opacus_ghost"]
    files = [f"--results={tmp_path / 'r.md'}", f"--json={tmp_path / 'r.json'}"]
    speed(*TINY, "--variants", *names, *files, check=True)
    (found,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["note"] for row in found["rows"]] == ["", "", ""]
    assert {row["facts"]["num_parameters"] for row in found["rows"]} == {found["rows"][0]["facts"]["num_trained"]}
    assert len(found["ratios"]) == 2
