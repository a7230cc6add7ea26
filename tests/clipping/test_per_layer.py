"""Per-layer clipping: groups, bounds, and updates against a loop of autograd.grad over samples and groups."""

import math

import pytest
import torch
from torch import nn

import lightning_dp as ldp
from lightning_dp.clipping import PerLayerClipping
from tests.models import Regression, ZeroGradient, loader, trainer

NAMES = {"net.0.weight": 24, "net.0.bias": 8, "net.2.weight": 8, "net.2.bias": 8, "scale": 1}


def groups_of(clipping, sizes=None):
    return {part.names: part.clipping.max_grad_norm for part in clipping.parts(sizes or NAMES)}


def test_the_layer_of_a_parameter_is_the_module_that_holds_it():
    bounds = groups_of(PerLayerClipping(3.0))
    expected = [("net.0.weight", "net.0.bias"), ("net.2.weight", "net.2.bias"), ("scale",)]
    assert list(bounds) == expected
    assert list(bounds.values()) == pytest.approx([3.0 / math.sqrt(3)] * 3)


def test_bounds_by_size():
    bounds = groups_of(PerLayerClipping(2.0, budgets="size"))
    assert list(bounds.values()) == pytest.approx([2 * math.sqrt(d / 49) for d in (32, 16, 1)])


def test_named_groups_come_before_layers_and_the_first_that_fits_counts():
    clipping = PerLayerClipping(1.0, groups={"biases": ["*.bias"], "all of net": ["net"]})
    expected = [("net.0.weight", "net.2.weight"), ("net.0.bias", "net.2.bias"), ("scale",)]
    assert list(groups_of(clipping)) == expected
    assert str(clipping) == "per_layer (2 named groups, equal bounds)"


@pytest.mark.parametrize("budgets", ["equal", "size"])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_bounds_of_all_groups_together_are_the_bound(budgets, count):
    sizes = {f"layer{k}.weight": k**2 for k in range(count)}  # one of no elements is among them
    bounds = groups_of(PerLayerClipping(0.3, budgets=budgets), sizes).values()
    assert len(bounds) == count
    assert math.sqrt(sum(bound**2 for bound in bounds)) == pytest.approx(0.3, rel=1e-12)


def by_hand(module, data, bounds):
    """Clip every group of every sample's gradient, add, divide by the number of samples."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    x, y = data.dataset.tensors
    for i in range(len(x)):
        loss = module.training_step((x[i : i + 1], y[i : i + 1]), 0)
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        for names, bound in bounds.items():
            norm = math.sqrt(sum(float(gradients[name].square().sum()) for name in names))
            for name in names:
                total[name] += min(1.0, bound / norm) * gradients[name]
    return {name: part / len(x) for name, part in total.items()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2)).double()


def assert_update(module, bounds, clipping, physical=7, **settings):
    data = loader(n=20, batch_size=20, dtype=torch.float64)
    expected = by_hand(module, data, bounds)
    dp = ldp.DPStrategy(noise_multiplier=0, clipping=clipping, max_physical_batch_size=physical, **settings)
    trainer(dp, max_steps=1).fit(module, data)
    for name, part in expected.items():
        assert float((dict(module.named_parameters())[name].grad - part).norm()) <= 1e-12 * float(part.norm()), name


LAYERS = [("net.0.weight", "net.0.bias"), ("net.2.weight", "net.2.bias"), ("net.3.weight", "net.3.bias")]


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.5, 100.0])
@pytest.mark.parametrize("engine", ["book", "loop"])
def test_the_update(max_grad_norm, engine):
    bounds = {names: max_grad_norm / math.sqrt(3) for names in LAYERS}
    clipping = PerLayerClipping(max_grad_norm)
    assert_update(Regression(network()), bounds, clipping, clipping_engine=engine)


def test_the_update_by_name():
    assert_update(
        Regression(network()), {names: 0.2 / math.sqrt(3) for names in LAYERS}, "per_layer", max_grad_norm=0.2
    )


def test_the_update_of_named_groups():
    shares = {("net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"): 50, LAYERS[1]: 16}
    bounds = {names: 0.2 * math.sqrt(share / 66) for names, share in shares.items()}
    clipping = PerLayerClipping(0.2, groups={"linear": ["net.0", "net.3"]}, budgets="size")
    assert_update(Regression(network()), bounds, clipping)


def test_a_tied_parameter_is_in_the_group_of_its_first_module_only():
    class Tied(Regression):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)).double()
            self.net[2].weight = self.net[0].weight

    bounds = [("net.0.weight", "net.0.bias"), ("net.2.bias",), ("net.3.weight", "net.3.bias")]
    assert_update(Tied(), {names: 0.1 / math.sqrt(3) for names in bounds}, PerLayerClipping(0.1))


def test_groups_are_those_of_the_parameters_that_are_trained():
    module = Regression(network())
    module.net[2].requires_grad_(False)
    assert_update(module, {LAYERS[0]: 0.1 / math.sqrt(2), LAYERS[2]: 0.1 / math.sqrt(2)}, PerLayerClipping(0.1))


def test_groups_follow_when_parameters_are_frozen_on_the_way():
    data = loader(n=20, batch_size=20, dtype=torch.float64)
    second = {}

    class Freezes(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 1:
                self.net[0].requires_grad_(False)
                second.update(by_hand(self, data, {names: 0.1 / math.sqrt(2) for names in LAYERS[1:]}))

    module = Freezes(network(), lr=0.1)
    dp = ldp.DPStrategy(noise_multiplier=0, clipping=PerLayerClipping(0.1))
    trainer(dp, max_steps=2).fit(module, data)
    assert set(second) == {name for names in LAYERS[1:] for name in names}
    for name, part in second.items():
        assert float((dict(module.named_parameters())[name].grad - part).norm()) <= 1e-12 * float(part.norm())


def test_a_pattern_that_fits_nothing_is_refused():
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping=PerLayerClipping(groups={"end": ["net.3", "head"]}))
    with pytest.raises(
        ldp.PrivacyConfigurationError, match="'head' of the group 'end' fits no parameter; there are net"
    ):
        trainer(dp, max_steps=1).fit(Regression(network()), loader(dtype=torch.float64))
    assert dp.num_releases == 0


def test_manual_optimization_with_a_release_for_each_optimizer():
    """Groups are those of all parameters that are trained, so that no release exceeds the bound."""

    class Manual(Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=1e-9) for part in (self.net[:1], self.net[1:])]

    module, dp = Manual(network()), ldp.DPStrategy(noise_multiplier=0, clipping=PerLayerClipping(0.1))
    data = loader(n=20, batch_size=20, dtype=torch.float64)
    expected = by_hand(Regression(network()), data, {names: 0.1 / math.sqrt(3) for names in LAYERS})
    trainer(dp, max_steps=2).fit(module, data)
    assert dp._run.mechanism.releases_per_draw == 2
    for name, part in expected.items():
        found = dict(module.named_parameters())[name].grad
        assert float((found - part).norm()) <= 1e-6 * float(part.norm()), name


def test_the_share_of_samples_with_a_layer_that_was_clipped():
    data = loader(n=20, batch_size=20, dtype=torch.float64)
    module = Regression(network())
    x, y = data.dataset.tensors
    clipped, norms = 0, []
    for i in range(20):
        gradients = torch.autograd.grad(
            module.training_step((x[i : i + 1], y[i : i + 1]), 0), list(module.parameters())
        )
        squares = [float(g.square().sum()) for g in gradients]
        layers = [math.sqrt(squares[k] + squares[k + 1]) for k in (0, 2, 4)]
        clipped += any(layer > 6 / math.sqrt(3) for layer in layers)
        norms.append(math.sqrt(sum(squares)))
    dp = ldp.DPStrategy(noise_multiplier=0, clipping=PerLayerClipping(6), private_statistics=True)
    trainer(dp, max_steps=1).fit(module, data)
    assert 0 < clipped < 20
    assert dp.private_statistics["clipped_share"] == clipped / 20
    assert dp.private_statistics["grad_norm"] == pytest.approx(sorted(norms)[9])


def test_noise_has_the_scale_of_all_groups_together():
    """A loss of gradient zero: each coordinate of the update has the std of the flat bound."""
    module = ZeroGradient(nn.Sequential(nn.Linear(3, 2000), nn.Linear(2000, 2)))
    dp = ldp.DPStrategy(noise_multiplier=2.0, clipping=PerLayerClipping(0.5))
    trainer(dp, max_steps=1).fit(module, loader(batch_size=5))
    for p in module.parameters():
        if p.numel() > 1000:
            assert float(p.grad.std()) == pytest.approx(2.0 * 0.5 / 5, rel=0.06)
