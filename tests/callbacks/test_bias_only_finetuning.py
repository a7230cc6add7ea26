"""What is frozen, and that the rest is trained as a per-sample loop over the biases would."""

import pytest
import torch
from torch import nn

import lightning_dp as ldp
from lightning_dp.callbacks.selection import is_bias, matches
from tests.models import Regression, clipped_mean, loader, parameters, trainer, updates


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_only_biases_and_what_is_unfrozen_move():
    module = Regression(net())
    before = parameters(module)
    trainer(callbacks=[ldp.BiasOnlyFinetuning(unfreeze=("net.3",))]).fit(module, loader(dtype=torch.float64))
    moved = {name for name, u in updates(module, before).items() if bool((u != 0).any())}
    assert moved == {"net.0.bias", "net.1.bias", "net.3.weight", "net.3.bias"}


def test_the_update_is_that_of_a_loop_over_the_biases():
    module, data = Regression(net()), loader(dtype=torch.float64, batch_size=20)
    x, y = data.dataset.tensors
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), 20)
    module.requires_grad_(True)
    before = parameters(module)
    dp = ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, max_steps=1, callbacks=[ldp.BiasOnlyFinetuning()]).fit(module, data)
    found = updates(module, before)
    assert all(torch.allclose(-found[name], g, rtol=1e-12, atol=1e-15) for name, g in expected.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.bias", True), ("in_proj_bias", True), ("lstm.bias_ih_l0", True), ("bias.weight", False), ("a.weight", False)],
)
def test_is_bias(name, expected):
    assert is_bias(name) == expected


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.head.weight", "head", True),
        ("head.weight", "head", True),
        ("model.head.0.weight", "model.head", True),
        ("model.header.weight", "head", False),
        ("model.norm1.weight", "*.norm*.weight", True),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) == expected


def test_errors():
    with pytest.raises(ldp.PrivacyConfigurationError, match="'heed' fits no parameter; there are net.0.weight"):
        trainer(callbacks=[ldp.BiasOnlyFinetuning(unfreeze="heed")]).fit(Regression(net()), loader())
    with pytest.raises(ldp.PrivacyConfigurationError, match="none of the 1 parameters is a bias"):
        trainer(callbacks=[ldp.BiasOnlyFinetuning()]).fit(Regression(nn.Linear(3, 2, bias=False)), loader())
