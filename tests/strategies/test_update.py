"""The update of one step, against a loop of autograd.grad over the samples."""

import copy

import pytest
import torch
from torch import nn

import lightning_dp as ldp
from tests.models import Regression, clipped_mean, loader, parameters, trainer, updates

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2))


def one_step(module, data, precision="32-true", **settings):
    """Return the released gradient; an update of rate 1 is minus that, up to the rounding of the parameters."""
    before = parameters(module)
    strategy = ldp.DPStrategy(noise_multiplier=0, **settings)
    trainer(strategy, max_steps=1, precision=precision).fit(module, data)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    for name, update in updates(module, before).items():
        rounding = torch.finfo(update.dtype).eps * (before[name].abs().max() + update.abs().max())
        assert (update + found[name]).abs().max() <= rounding
    return {name: g.double() for name, g in found.items()}


def double(module):
    return copy.deepcopy(module).double()


def relative_error(found, expected):
    scale = torch.stack([v.norm() for v in expected.values()]).norm()
    return float(torch.stack([(found[n] - v).norm() for n, v in expected.items()]).norm() / scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, 100.0])
def test_update_is_the_clipped_mean(dtype, clipping, max_grad_norm):
    module, data = Regression(net().to(dtype)), loader(dtype=dtype, batch_size=20)
    x, y = data.dataset.tensors
    automatic = clipping == "automatic"
    x, y = x.double(), y.double()
    expected = clipped_mean(
        double(module), lambda i: (x[i : i + 1], y[i : i + 1]), 20, max_grad_norm, automatic=automatic
    )
    found = one_step(module, data, clipping=clipping, max_grad_norm=max_grad_norm)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("physical", [1, 5, 7, 1000])
def test_physical_batch_size_does_not_change_the_update(physical):
    data = loader(dtype=torch.float64, batch_size=20)
    whole = one_step(Regression(net().double()), data)
    parts = one_step(Regression(net().double()), data, max_physical_batch_size=physical)
    assert relative_error(parts, whole) < 1e-12


def test_sum_reduction_equals_mean_reduction():
    class Sum(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return (self.net(x) - y).square().mean(1).sum()

    data = loader(dtype=torch.float64, batch_size=20)
    mean = one_step(Regression(net().double()), data, max_physical_batch_size=6)
    total = one_step(Sum(net().double()), data, max_physical_batch_size=6, loss_reduction="sum")
    assert relative_error(total, mean) < 1e-12


def test_a_batch_of_one_example_that_is_the_whole_dataset():
    module, data = Regression(net().double()), loader(n=1, dtype=torch.float64, batch_size=1)
    x, y = data.dataset.tensors
    expected = clipped_mean(module, lambda i: (x, y), 1)
    found = one_step(module, data, target_delta=0.1)
    assert relative_error(found, expected) < 1e-12


def test_a_sample_that_is_not_finite_adds_nothing():
    module, data = Regression(net().double()), loader(dtype=torch.float64, batch_size=20)
    x, y = data.dataset.tensors
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), 20)
    without = clipped_mean(module, lambda i: (x[:1], y[:1]), 1)
    x[0, 0] = float("nan")
    found = one_step(module, data)
    assert relative_error(found, {n: expected[n] - without[n] / 20 for n in expected}) < 1e-12


def test_parameters_outside_the_optimizer_stay_and_do_not_count_in_the_norm():
    class Head(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[3].parameters(), lr=1.0)

    module, data = Head(net().double()), loader(dtype=torch.float64, batch_size=20)
    x, y = data.dataset.tensors
    module.net[:3].requires_grad_(False)
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), 20)
    module.net[:3].requires_grad_(True)
    found = one_step(module, data)
    assert all(bool((found[n] == 0).all()) for n in found if not n.startswith("net.3."))
    assert relative_error(found, expected) < 1e-12
    assert all(p.grad is None for p in module.net[:3].parameters())


def test_an_unused_parameter_is_trained_on_noise_alone():
    class Unused(Regression):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(1000))

    module = Unused()
    trainer(ldp.DPStrategy(noise_multiplier=2.0), max_steps=1).fit(module, loader())
    assert float(module.extra.detach().std()) == pytest.approx(2.0 / 5, rel=0.1)


def test_precision_bf16_mixed_stays_close():
    data = loader(batch_size=20)
    exact = one_step(Regression(net()), data)
    assert relative_error(one_step(Regression(net()), data, precision="bf16-mixed"), exact) < 2e-2


@pytest.mark.parametrize("engine", ["book", "loop"])
def test_gradient_hooks_see_released_gradients_only(engine):
    seen = []

    class Hooks(Regression):
        def on_after_backward(self):
            seen.append([p.grad is None for p in self.parameters()])

        def on_before_optimizer_step(self, optimizer):
            seen.append([p.grad is not None for p in self.parameters()])

    trainer(ldp.DPStrategy(noise_multiplier=1.0, clipping_engine=engine), max_steps=2).fit(Hooks(), loader())
    assert len(seen) >= 4
    assert all(all(row) for row in seen)
