"""The command line: every configuration parses and fits a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

import lightning_dp as ldp
from lightning_dp.cli import DPLightningCLI
from lightning_dp.demos.digits import DigitsDataModule
from lightning_dp.strategies import DPStrategy

NEED_A_DOWNLOAD = ("text_bitfit", "cifar10", "sst2")  # tests/demos fits them on made-up data
ALL = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
CONFIGS = [path for path in ALL if path.stem not in NEED_A_DOWNLOAD]
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _no_command_line_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])


def command_line(*args):
    return DPLightningCLI(args=list(args), save_config_callback=None)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_fits_a_few_steps(config):
    cli = command_line("fit", f"--config={config}", "--trainer.max_steps=3", *QUIET)
    assert cli.trainer.global_step == 3
    public = any(isinstance(callback, ldp.PublicPretraining) for callback in cli.trainer.callbacks)
    assert cli.trainer.strategy.num_releases == (0 if public else 3)  # its plateau takes longer
    assert cli.trainer.strategy.epsilon <= cli.config.fit.trainer.strategy.init_args.target_epsilon


def test_the_table_after_a_fit_has_the_test_accuracy(capsys):
    command_line("fit", f"--config={CONFIGS[0]}", "--trainer.max_steps=2", *QUIET)
    printed = capsys.readouterr().out
    for expected in ("epsilon spent", "delta", "steps", "test accuracy"):
        assert expected in printed
    assert printed.count("Privacy summary") == 1


def test_defaults_are_private():
    cli = DPLightningCLI(
        args=[
            "--model=lightning_dp.demos.digits.DigitsClassifier",
            "--data=lightning_dp.demos.digits.DigitsDataModule",
            "--trainer.strategy.target_epsilon=1.5",
            *QUIET,
        ],
        run=False,
        save_config_callback=None,
    )
    assert isinstance(cli.trainer.strategy, DPStrategy)
    names = [type(c).__name__ for c in cli.trainer.callbacks]
    assert names.count("PrivacyMonitor") == names.count("PrivacyBudgetStopping") == 1


def test_console_command_prints_a_configuration():
    command = [sys.executable, "-m", "lightning_dp.cli", "fit", f"--config={CONFIGS[0]}", "--print_config"]
    environment = {**os.environ, "PYTHONPATH": str(Path(ldp.__file__).parents[1])}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    strategy = yaml.safe_load(printed)["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_dp.DPStrategy"
    assert strategy["init_args"]["target_epsilon"] == 3.0


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("FlatClipping", {"max_grad_norm": 0.5}),
        ("AutomaticClipping", {"max_grad_norm": 0.5}),
        ("PSACClipping", {"max_grad_norm": 0.5, "r": 0.2}),
        ("PerLayerClipping", {"groups": {"ends": ["net.0", "net.2"]}, "budgets": "size"}),
        ("AdaptiveClipping", {"quantile": 0.75, "count_noise_std": 20.0}),
    ],
)
def test_clipping_in_yaml(tmp_path, kind, arguments):
    config = tmp_path / "clipping.yaml"
    clipping = {"class_path": f"lightning_dp.{kind}", "init_args": arguments}
    strategy = {"class_path": "lightning_dp.DPStrategy", "init_args": {"clipping": clipping, "noise_multiplier": 1.0}}
    model, data = (f"lightning_dp.demos.digits.Digits{name}" for name in ("Classifier", "DataModule"))
    config.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}, "model": model, "data": data}))
    cli = DPLightningCLI(args=[f"--config={config}", *QUIET], run=False, save_config_callback=None)
    found = cli.trainer.strategy._run.settings.resolved_clipping()
    assert type(found) is getattr(ldp, kind)
    for name, value in arguments.items():
        shown = {group: list(patterns) for group, patterns in found.groups.items()} if name == "groups" else None
        assert (shown or getattr(found, name)) == value


def test_a_misspelt_argument_is_refused(capsys):
    with pytest.raises(SystemExit):
        command_line("fit", f"--config={CONFIGS[0]}", "--trainer.strategy.target_epsilonn=1")
    assert "target_epsilonn" in capsys.readouterr().err


def test_a_trainer_with_any_arguments_of_fit_can_be_planned():
    class Custom(pl.Trainer):
        def fit(self, *args, **kwargs):
            super().fit(*args, **kwargs)

    cli = DPLightningCLI(
        trainer_class=Custom,
        args=["plan", f"--config={CONFIGS[0]}", "--trainer.max_steps=2", "--trainer.strategy.accountant=rdp", *QUIET],
    )
    assert isinstance(cli.trainer, Custom)
    assert cli.config.plan.plot is None
    assert cli.trainer.strategy.num_releases == 0


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("4", 4), ("null", None)])
def test_the_physical_batch_size_is_a_number_or_a_word(given, expected):
    cli = DPLightningCLI(
        args=[f"--config={CONFIGS[0]}", f"--trainer.strategy.max_physical_batch_size={given}", *QUIET],
        run=False,
        save_config_callback=None,
    )
    assert cli.trainer.strategy._run.settings.max_physical_batch_size == expected
    assert type(cli.trainer.strategy._run.settings.max_physical_batch_size) is type(expected)


def test_another_word_for_the_physical_batch_size(capsys):
    with pytest.raises(SystemExit):
        command_line("fit", f"--config={CONFIGS[0]}", "--trainer.strategy.max_physical_batch_size=largest", *QUIET)
    assert "largest" in capsys.readouterr().err


def test_the_word_in_a_configuration_fits(tmp_path):
    settings = yaml.safe_load(CONFIGS[0].read_text())
    settings["trainer"]["strategy"]["init_args"]["max_physical_batch_size"] = "auto"
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(settings))
    cli = command_line("fit", f"--config={tmp_path / 'auto.yaml'}", "--trainer.max_steps=2", *QUIET)
    assert cli.trainer.strategy.num_releases == 2


def test_public_data_from_the_command_line():
    """Two of four steps on what ``public_dataloader()`` of the data returns."""
    cli = command_line(
        "fit",
        "--model=lightning_dp.demos.digits.DigitsClassifier",
        "--data=lightning_dp.demos.digits.DigitsDataModule",
        "--data.public_share=0.1",
        "--trainer.callbacks+={class_path: lightning_dp.PublicPretraining, init_args: {switch: 0.5}}",
        "--trainer.max_steps=4",
        "--trainer.strategy.target_epsilon=1",
        *QUIET,
    )
    assert (cli.trainer.global_step, cli.trainer.strategy.num_releases) == (4, 2)


def some_public_data():
    data = DigitsDataModule(public_share=0.1)
    data.setup("fit")
    return data.public_dataloader()


def test_public_data_from_a_function_that_is_named():
    cli = command_line(
        "fit",
        "--model=lightning_dp.demos.digits.DigitsClassifier",
        "--data=lightning_dp.demos.digits.DigitsDataModule",
        "--trainer.callbacks+={class_path: lightning_dp.PublicPretraining, "
        "init_args: {switch: 0.5, public_dataloader: tests.test_cli.some_public_data}}",
        "--trainer.max_steps=2",
        "--trainer.strategy.target_epsilon=1",
        *QUIET,
    )
    assert (cli.trainer.global_step, cli.trainer.strategy.num_releases) == (2, 1)
