"""Features of a public network: what is public, and that a private head on them beats one on the pixels."""

import runpy
import statistics
from pathlib import Path

import pytest
import torch

from lightning_dp.demos import vision_features
from lightning_dp.demos.digits import Digits, DigitsDataModule
from lightning_dp.demos.vision_features import PIXELS, Centred, DigitFeatures, SmallConvNet

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision_features.py"


def features(monkeypatch, backbone=None):
    monkeypatch.setattr(vision_features, "trained_on", lambda public: SmallConvNet())
    data = DigitFeatures(backbone)
    data.setup("fit")
    return data


def test_the_parts_are_those_of_the_digits_and_nothing_is_in_two(monkeypatch):
    data, digits = features(monkeypatch, PIXELS), DigitsDataModule()
    digits.setup("fit")
    x, y = digits.train[:]
    assert torch.equal(torch.cat([data.public.labels, data.train.labels]), y)
    assert (len(data.public), len(data.train), len(data.held_out)) == (50, 1387, 360)
    centred = torch.nn.functional.normalize(x - x[:50].mean(0))
    assert torch.allclose(torch.cat([data.public.features, data.train.features]), centred, atol=1e-5)
    assert torch.equal(data.held_out.labels, digits.held_out[:][1])


def test_features_have_one_length_and_are_computed_once(monkeypatch):
    data = features(monkeypatch)
    assert torch.allclose(data.train.features.norm(dim=1), torch.ones(1387))
    before = data.train
    data.setup("test")
    assert data.train is before
    (batch,) = data.train_dataloader()
    assert batch[0].shape == (1387, 256)


def test_public_digits_train_the_network():
    torch.manual_seed(0)
    digits = DigitsDataModule()
    digits.setup("fit")
    public = Digits(*digits.train[:50])
    encoder = vision_features.trained_on(public, steps=30)
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        outputs = [Centred(network, public)(digits.held_out[:][0]) for network in (SmallConvNet(), encoder)]
    y = digits.held_out[:][1]

    def spread(f):  # between the classes, as a share of all
        means = torch.stack([f[y == label].mean(0) for label in range(10)])
        return float(means.var(0).sum() / f.var(0).sum())

    assert spread(outputs[1]) > spread(outputs[0]) + 0.1


def test_the_example_stays_within_its_budgets():
    found = runpy.run_path(str(EXAMPLE))["table"](num_seeds=1, steps=5)
    epsilons = {name: rows[0][0] for name, rows in found.items()}
    assert list(epsilons) == [
        "public digits alone",
        "DP, epsilon 0.5",
        "DP, epsilon 1",
        "DP, epsilon 3",
        "epsilon 1, pixels",
    ]
    assert epsilons["public digits alone"] == 0
    assert 0.99 * 0.5 < epsilons["DP, epsilon 0.5"] <= 0.5
    assert 0.99 * 3 < epsilons["DP, epsilon 3"] <= 3
    assert found["public digits alone"][0][1] > 0.8


@pytest.mark.slow
def test_private_digits_and_public_features_both_help():
    found = runpy.run_path(str(EXAMPLE))["table"](num_seeds=3)
    mean = {name: statistics.mean(accuracy for _, accuracy in rows) for name, rows in found.items()}
    assert mean["DP, epsilon 1"] > mean["public digits alone"] + 0.02
    assert mean["DP, epsilon 1"] > mean["epsilon 1, pixels"] + 0.02
