"""Public and private digits, and the claim for which they are there: biases alone come within a point of everything."""

import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

from lightning_dp.cli import DPLightningCLI
from lightning_dp.demos.digits import DigitsDataModule
from lightning_dp.demos.shaded_digits import PretrainedDigitsClassifier, ShadedDigitsDataModule, public_digits, shade

ROOT = Path(__file__).parents[2]


def test_the_parts_are_those_of_the_digits_and_nothing_is_in_two():
    everything, private = DigitsDataModule(), ShadedDigitsDataModule()
    everything.setup("fit")
    private.setup("fit")
    (x, y), (x_public, y_public), (x_private, y_private) = everything.train[:], public_digits()[:], private.train[:]
    assert (len(x_public), len(x_private), len(private.held_out)) == (400, 1037, 360)
    assert torch.equal(torch.cat([x_public, x_private]), torch.cat([x[:400], shade(x[400:])]))
    assert torch.equal(torch.cat([y_public, y_private]), y)
    assert torch.equal(private.held_out[:][0], shade(everything.held_out[:][0]))


def test_a_shadow_darkens_from_left_to_right_and_never_beyond_ink():
    image = torch.zeros(1, 8, 8)
    image[0, 3] = 1.0
    shaded = shade(image.view(1, 64), depth=0.7).view(8, 8)
    assert shaded[0].tolist() == pytest.approx([k / 10 for k in range(8)])
    assert torch.equal(shaded[3], torch.ones(8))


def test_public_digits_have_trained_the_network():
    model = PretrainedDigitsClassifier()
    x, y = public_digits()[:]
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    assert all(p.grad is None for p in model.parameters())


def test_the_configuration_trains_biases_within_its_budget(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    config = f"--config={ROOT / 'configs' / 'digits_bitfit.yaml'}"
    cli = DPLightningCLI(args=["fit", config, "--trainer.max_steps=4", *quiet], save_config_callback=None)
    assert {name for name, p in cli.model.named_parameters() if p.requires_grad} == {"net.0.bias", "net.2.bias"}
    assert cli.trainer.strategy.num_releases == 4
    assert 0 < cli.trainer.strategy.epsilon <= 1


@pytest.mark.slow
def test_biases_alone_come_within_a_point_of_full_fine_tuning():
    found = runpy.run_path(str(ROOT / "examples" / "digits_bitfit.py"))["table"]()
    before, full, biases = (statistics.mean(o.accuracy for o in outcomes) for outcomes in found.values())
    assert list(found) == ["pre-trained, no fine-tuning", "DP full", "DP bias-only"]
    assert biases >= full - 0.01
    assert min(full, biases) > before + 0.05
    assert all(0 < o.epsilon <= 1 for o in found["DP full"] + found["DP bias-only"])
    assert all(o.share == 138 / 9610 for o in found["DP bias-only"])
