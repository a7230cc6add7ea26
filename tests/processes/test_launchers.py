"""How processes are started: by Lightning in every way, and by torchrun."""

import inspect
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

import lightning_dp as ldp
from lightning_dp.cli import DPLightningCLI
from lightning_dp.strategies.checks import check_alone
from lightning_dp.strategies.launching import PrivateLauncher
from tests.accounting.oracles import pld_epsilon
from tests.models import Regression, loader, trainer

SCRIPT = """
import sys, torch
import lightning_dp as ldp
from tests.models import Regression, loader, parameters, trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    dp = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3, start_method=sys.argv[1])
    fit = trainer(dp, max_steps=3, devices=2)
    module = Regression()
    before = parameters(module)
    fit.fit(module, loader(n=20, batch_size=2))
    moved = all((p != before[name]).any() for name, p in module.named_parameters())
    if fit.is_global_zero:
        print("RESULT", dp.num_releases, dp.sample_rate, dp.epsilon, moved)
"""
COMMANDS = {
    "popen": [sys.executable],
    "spawn": [sys.executable],
    "fork": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", COMMANDS)
def test_a_script_trains_on_two_processes(way, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*COMMANDS[way], str(script), "popen" if way == "torchrun" else way]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("RESULT")]
    _, releases, rate, epsilon, moved = line.split()
    assert (int(releases), float(rate), moved) == (3, 0.2, "True")
    assert float(epsilon) == pytest.approx(pld_epsilon([(0.2, 2.0, 3)], 1e-3), rel=0.02)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_run_that_was_lost_in_other_processes_goes_on_nowhere(monkeypatch):
    """Whatever the processes that were started have released, this one does not know it."""

    def launch(*args, **kwargs):
        raise KeyError("a process has ended")

    monkeypatch.setattr(_MultiProcessingLauncher, "launch", launch)
    dp = ldp.DPStrategy(noise_multiplier=1.0, start_method="fork")
    fit = trainer(dp, devices=2)
    with pytest.raises(KeyError, match="a process has ended"):
        fit.validate(Regression(), loader())
    assert dp.epsilon == 0  # no fit, no release
    with pytest.raises(KeyError, match="a process has ended"):
        fit.fit(Regression(), loader())
    with pytest.raises(ldp.PrivacyError, match="what it has released is not known in this one"):
        _ = dp.epsilon


def test_what_makes_several_trainers_takes_one_device():
    check_alone(trainer(), "a benchmark")
    with pytest.raises(ldp.PrivacyConfigurationError, match="a benchmark on 2 devices.*Use devices=1"):
        check_alone(trainer(devices=2), "a benchmark")


def test_one_device_needs_neither_launcher_nor_process_group():
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0, start_method="spawn"), max_steps=1)
    fit.fit(Regression(), loader())
    assert fit.strategy.launcher is None
    assert type(fit.strategy._run.processes).__name__ == "Processes"


def test_the_command_line_takes_the_arguments_of_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    cli = DPLightningCLI(
        args=[
            "--model=lightning_dp.demos.digits.DigitsClassifier",
            "--data=lightning_dp.demos.digits.DigitsDataModule",
            "--trainer.devices=2",
            "--trainer.accelerator=cpu",
            "--trainer.strategy.target_epsilon=1.5",
            "--trainer.strategy.timeout=0:10:00",
            "--trainer.strategy.process_group_backend=gloo",
            "--trainer.strategy.start_method=spawn",
            *(f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")),
        ],
        run=False,
        save_config_callback=None,
    )
    strategy = cli.trainer.strategy
    assert cli.trainer.world_size == 2
    assert strategy._timeout == timedelta(minutes=10)
    assert strategy.process_group_backend == "gloo"
    assert isinstance(strategy.launcher, PrivateLauncher)


@pytest.mark.parametrize("strategy", ["DPStrategy", "DPFSDPStrategy"])
def test_the_command_line_explains_the_arguments_of_every_strategy(strategy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    with pytest.raises(SystemExit):
        DPLightningCLI(args=["fit", f"--trainer.strategy.help=lightning_dp.{strategy}"])
    told = " ".join(capsys.readouterr().out.split()).split("Help for ")[1]
    for name in inspect.signature(ldp.DPStrategy.__init__).parameters.keys() - {"self"}:
        assert re.search(rf"strategy\.{name} \S+ (?!\(type: )", told), name
