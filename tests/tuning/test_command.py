"""`lightning-dp tune` from a configuration."""

import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.cli import COMMANDS, main
from lightning_dp.tuning import FrozenFeatures
from tests.accounting.oracles import pld_epsilon
from tests.tuning.test_tuner import releases_on_disk


class Features(pl.LightningDataModule):
    def __init__(self, batch_size: int = 120):
        super().__init__()
        x = torch.randn(170, 4, generator=torch.Generator().manual_seed(1))
        self.data = FrozenFeatures(torch.nn.Identity(), TensorDataset(x, (x[:, 0] > 0).long()))
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.data, range(120)), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.data, range(120, 170)), batch_size=50)


@pytest.fixture
def config(tmp_path):
    strategy = {"class_path": "lightning_dp.DPStrategy", "init_args": {"target_epsilon": 2.0, "target_delta": 1e-3}}
    head = {"class_path": "lightning_dp.tuning.LinearHead", "init_args": {"num_features": 4, "num_classes": 2}}
    content = {
        "trainer": {"accelerator": "cpu", "strategy": strategy},
        "model": head,
        "data": {"class_path": f"{__name__}.Features"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-dp", "tune", *map(str, arguments)])
    main()


def test_a_configuration_is_tuned_within_its_budget(monkeypatch, config, capsys):
    options = ("--selection", "public", "--steps", 3, 6, "--num_runs", 2, 1, "--small_epsilons", 0.1, 0.3)
    run(monkeypatch, "--config", config, *options, "--directory", "found")
    printed = " ".join(capsys.readouterr().out.split())
    assert "epsilon 2.0000 of 2 at delta 0.001" in printed
    assert "final" in printed
    releases = releases_on_disk("found")
    assert pld_epsilon(releases, 1e-3) == pytest.approx(2.0, abs=5e-3)
    assert all(rate == 1 for rate, _, _ in releases)
    run(monkeypatch, "--config", config, *options, "--directory", "found")
    assert releases_on_disk("found") == releases
    tried = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    assert len(set(tried)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selection=private", "--score_noise=0"], "noise_multiplier=0 of PrivateSelection"),
        (["--selection=public", "--data.batch_size=60"], "sample_rate=0.5: expected 1"),
        (["--selection=public", "--trainer.strategy=auto"], "expected a DPStrategy"),
        (["--selection=public", "--lr", "2", "1"], "lr=.* to search in"),
    ],
)
def test_what_cannot_be_searched_ends_with_the_reason(monkeypatch, config, arguments, message):
    with pytest.raises(SystemExit, match=f"lightning-dp tune: .*{message}"):
        run(monkeypatch, "--config", config, *arguments)


def test_the_selection_must_be_said(monkeypatch, config, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", config)
    assert "--selection" in capsys.readouterr().err


def test_the_command_explains_itself(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert "--small_epsilons" in printed
    assert "tune" in COMMANDS
