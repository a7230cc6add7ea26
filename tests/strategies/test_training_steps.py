"""Forms of a training step: the fit equals one by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_dp as ldp
from tests.models import clipped_mean
from tests.strategies.reference import (
    Regression,
    assert_equal,
    assert_fit_is_right,
    by_hand,
    network,
    private_fit,
    whole,
)


class Checkpointed(Regression):
    reentrant = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = checkpoint(self.net[:2], x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return F.mse_loss(checkpoint(self.net[2:], h, use_reentrant=self.reentrant), y)


class ReentrantlyCheckpointed(Checkpointed):
    reentrant = True


class ReturnsDict(Regression):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return {"loss": F.mse_loss(out, batch[1]), "out": out.detach()}


class SeveralLosses(Regression):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        penalty = sum(p.square().sum() for p in self.parameters())
        return F.mse_loss(out, batch[1]) + 0.3 * F.l1_loss(out, batch[1]) + 0.01 * penalty


class NamedBatch(Regression):
    def training_step(self, batch):
        return F.mse_loss(self.net(batch[0]), batch[1])


class CallsForward(Regression):
    def forward(self, x):
        return self.net(x).clone()

    def training_step(self, *args, **kwargs):
        x, y = args[0]
        return (self(x) - y).square().mean()


class Adversarial(Regression):
    """Moves the inputs along a gradient of its own, which does not go into the loss."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (inner,) = torch.autograd.grad(self.net(x).sum(), x)
        return F.mse_loss(self.net(x.detach() + 0.1 * inner.sign()), batch[1])


class GradientPenalty(Regression):
    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        out = self.net(x)
        (inner,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, batch[1]) + inner.square().mean()


@pytest.mark.parametrize("engine", ["book", "loop"])
def test_an_inner_gradient(engine):
    assert_fit_is_right(Adversarial(network()), strategy={"clipping_engine": engine})


def test_a_gradient_penalty_needs_the_loop():
    with pytest.raises(ldp.UnsupportedModelError, match=r"goes into the loss.*clipping_engine='loop'"):
        private_fit(GradientPenalty(network()), whole())
    assert_fit_is_right(GradientPenalty(network()), strategy={"clipping_engine": "loop"})


@pytest.mark.parametrize("kind", [Checkpointed, ReentrantlyCheckpointed, NamedBatch, CallsForward])
def test_forms_of_a_training_step(kind):
    plain, module = Regression(network()), kind(network())
    expected = by_hand(plain, whole())
    private_fit(module, whole())
    assert_equal(module, expected)


def test_several_losses_and_a_penalty_on_weights():
    assert_fit_is_right(SeveralLosses(network()))


def test_a_dict_with_more_than_the_loss():
    seen = []
    module = ReturnsDict(network())
    module.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(sorted(outputs))
    expected = by_hand(Regression(network()), whole())
    private_fit(module, whole())
    assert seen == [["loss", "out"]] * 3
    assert_equal(module, expected)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("physical", [5, 12])
def test_a_step_without_a_loss_releases_no_gradient(physical):
    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            return None if self.global_step == 1 else super().training_step(batch, batch_idx)

    module = Sometimes(network())
    expected = by_hand(Regression(network()), whole(), steps=2)
    private_fit(module, whole(), steps=3, strategy={"max_physical_batch_size": physical})
    assert_equal(module, expected)


def test_parameters_that_a_step_does_not_use():
    class Early(Regression):
        def __init__(self):
            super().__init__(network())
            self.shift = nn.Parameter(torch.full((2,), 0.5, dtype=torch.float64))
            self.never = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return F.mse_loss(out + self.shift if self.first else out, batch[1])

        @property
        def first(self):
            return self._trainer is None or self.global_step == 0

    module, data = Early(), whole()
    expected = by_hand(module, data, steps=1)
    private_fit(module, data, steps=1)
    assert_equal(module, expected)
    rest = Regression(copy.deepcopy(module.net))
    expected = by_hand(rest, data, steps=1)
    module = Early()
    private_fit(module, data, steps=2)
    assert_equal(Regression(module.net), expected)
    assert torch.equal(module.never, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["net.0", "net.2", "net.3", "net.3.bias"])
def test_frozen_parts(frozen):
    module = Regression(network())
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    fit = assert_fit_is_right(module)
    assert all(p.grad is None for p in fit.lightning_module.parameters() if not p.requires_grad)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2)])
def test_random_layers(layer):
    """Without clipping, what is released is autograd's gradient of the same batch with the same random numbers."""

    class Seeded(Regression):
        def training_step(self, batch, batch_idx):
            torch.manual_seed(5)
            self.batch = batch
            return super().training_step(batch, batch_idx)

    module = Seeded(nn.Sequential(nn.Linear(3, 16), layer, nn.LayerNorm(16), nn.Linear(16, 2)).double(), lr=0.0)
    fit = private_fit(module, whole(), steps=1, strategy={"max_grad_norm": 1e6, "max_physical_batch_size": 12})
    released = [p.grad.clone() for p in module.parameters()]
    loss = fit.lightning_module.train().training_step(module.batch, 0)
    for found, expected in zip(released, torch.autograd.grad(loss, list(module.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*UninitializedParameter")
@pytest.mark.parametrize("engine", ["book", "loop"])
def test_lazy_modules(engine):
    module, data = Regression(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)).double(), lr=0.0), whole()
    private_fit(module, data, steps=1, strategy={"clipping_engine": engine})
    x, y = data.dataset.tensors
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), len(x))
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-14)


def test_what_is_logged_is_the_mean_over_all_physical_batches():
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("rows", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    module, data = Logs(network(), lr=0.0), whole()
    fit = private_fit(module, data, steps=1, strategy={"max_physical_batch_size": 5})
    expected = F.mse_loss(module.net(data.dataset.tensors[0]), data.dataset.tensors[1]).detach()
    assert float(fit.callback_metrics["loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(fit.callback_metrics["rows"]) == 12
