"""DPAdamBC: its steps against the published algorithm written down in NumPy, and what it makes of pure noise."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_dp as ldp
from lightning_dp.cli import DPLightningCLI
from lightning_dp.optimizers import NoiseAware
from tests.models import Regression, ZeroGradient, loader, parameters, trainer


def published(theta, gradients, variances, *, lr, betas=(0.9, 0.999), floor=1e-8, decay=0.0):
    """Algorithm 1 of arXiv 2312.14334, with AdamW's decay; for noise that changes, its mean with Adam's own weights."""
    b1, b2 = betas
    theta, m, v = theta.astype(np.float64), np.zeros(theta.shape), np.zeros(theta.shape)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        weights = b2 ** np.arange(t)[::-1]
        phi = (weights * variances[:t]).sum() / weights.sum()
        scale = np.sqrt(np.maximum(v / (1 - b2**t) - phi, floor))
        theta = theta - lr * decay * theta
        theta = theta - lr * (m / (1 - b1**t)) / scale
    return theta


class Noted(Regression):
    """Notes the gradients that its optimizer steps by, and what it was told of their noise."""

    def __init__(self, net, kind=ldp.DPAdamBC, **settings):
        super().__init__(net)
        self.kind, self.settings, self.seen, self.stds = kind, settings, [], []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({name: p.grad.clone().numpy() for name, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), **self.settings)
        receive = optimizer.receive_noise
        optimizer.receive_noise = lambda noise_std: (self.stds.append(noise_std), receive(noise_std))
        return optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def assert_published(module, before, variances, **settings):
    assert len(module.seen) == len(variances)
    for name, p in module.named_parameters():
        gradients = [step[name] for step in module.seen]
        expected = published(before[name].numpy(), gradients, np.array(variances), **settings)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=name)
        assert not np.allclose(expected, before[name].numpy())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.01},
        {"lr": 0.1, "betas": (0.5, 0.9), "floor": 1e-3},
        {"lr": 0.1, "betas": (0.0, 0.0), "floor": 1e-12},
        {"lr": 0.02, "weight_decay": 0.5},
    ],
)
def test_the_published_algorithm(settings):
    module, data = Noted(network(), **settings), loader(dtype=torch.float64, batch_size=5)
    before = parameters(module)
    dp = ldp.DPStrategy(noise_multiplier=1.5, max_grad_norm=0.4)
    trainer(dp, max_steps=8).fit(module, data)
    by_hand = {"decay" if name == "weight_decay" else name: value for name, value in settings.items()}
    assert_published(module, before, [(1.5 * 0.4 / 5) ** 2] * 8, **by_hand)


def test_noise_that_changes():
    module, data = Noted(network(), lr=0.05, betas=(0.9, 0.95)), loader(dtype=torch.float64, batch_size=5)
    before = parameters(module)
    schedule = [ldp.Stage(3), ldp.Stage(2, noise_factor=3.0), ldp.Stage(3, noise_factor=0.5, batch_size_factor=2.0)]
    dp = ldp.DPStrategy(noise_multiplier=1.5, max_grad_norm=0.4, schedule=schedule)
    trainer(dp, max_steps=8).fit(module, data)
    stds = [1.5 * 0.4 / 5] * 3 + [4.5 * 0.4 / 5] * 2 + [0.75 * 0.4 / 10] * 3
    assert module.stds == pytest.approx(stds)
    assert_published(module, before, [std**2 for std in stds], lr=0.05, betas=(0.9, 0.95))


def test_noise_that_follows_a_bound():
    class Bounds(Noted):
        def on_train_batch_start(self, batch, batch_idx):
            bounds.append(self.trainer.strategy.max_grad_norm)

    module, bounds = Bounds(network(), lr=0.05), []
    dp = ldp.DPStrategy(noise_multiplier=1.5, clipping=ldp.AdaptiveClipping(0.4, count_noise_std=2.0))
    trainer(dp, max_steps=4).fit(module, loader(dtype=torch.float64, batch_size=5))
    assert len(set(bounds)) == 4
    assert module.stds == pytest.approx([(1.5**-2 - 4.0**-2) ** -0.5 * bound / 5 for bound in bounds])


def test_without_noise_it_is_adam():
    """Up to the place of Adam's small number, where second moments are far above it."""
    module, adam = Noted(network(), lr=0.01, floor=1e-30), Regression(network(), lr=0.01)
    adam.configure_optimizers = lambda: torch.optim.Adam(adam.parameters(), lr=0.01, eps=1e-15)
    for one in (module, adam):
        trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=5).fit(
            one, loader(n=20, batch_size=20, dtype=torch.float64)
        )
    for name, p in module.named_parameters():
        assert torch.allclose(p, dict(adam.named_parameters())[name], rtol=1e-6)


@pytest.mark.parametrize("told", [1.0, 0.8, 1.25])
def test_the_second_moment_of_pure_noise_is_about_zero(told):
    """And is not, if another scale is told than there is: the test can fail."""

    class Misled(ldp.DPAdamBC):
        def receive_noise(self, noise_std):
            super().receive_noise(told * noise_std)

    module = ZeroGradient(nn.Linear(3, 4000))
    module.configure_optimizers = lambda: Misled(module.parameters(), lr=0.0, betas=(0.9, 0.9))
    fit = trainer(ldp.DPStrategy(noise_multiplier=2.0, max_grad_norm=0.7), max_steps=12)
    fit.fit(module, loader(batch_size=5))
    state, variance = fit.optimizers[0].state[module.net.weight], (2.0 * 0.7 / 5) ** 2
    corrected = (state["exp_avg_sq"] - state["noise_variance"]) / (1 - 0.9**12)
    assert state["exp_avg_sq"].mean() / (1 - 0.9**12) == pytest.approx(variance, rel=0.05)
    # Squares of normal numbers have variance 2; the weights of 12 steps sum up to 1.
    weights = 0.9 ** np.arange(12) / (0.9 ** np.arange(12)).sum()
    error = variance * np.sqrt(2 * (weights**2).sum() / 12000)
    assert (abs(float(corrected.mean())) < 4 * error) == (told == 1.0)


class Manual(Noted):
    """Steps two optimizers itself; no sample has a part in the gradients of the second."""

    def __init__(self):
        super().__init__(network(), lr=0.01)
        self.automatic_optimization, self.free = False, nn.Parameter(torch.ones(3).double())
        self.told = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer, value in zip(self.optimizers(), (loss, self.free.square().sum()), strict=True):
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()

    def configure_optimizers(self):
        made = [ldp.DPAdamBC(self.net.parameters(), lr=0.01), ldp.DPAdamBC([self.free], lr=0.01)]
        for k, optimizer in enumerate(made):
            receive, told = optimizer.receive_noise, self.told.setdefault(k, [])
            optimizer.receive_noise = lambda std, receive=receive, told=told: (told.append(std), receive(std))
        return made


def test_manual_optimization():
    module = Manual()
    trainer(ldp.DPStrategy(noise_multiplier=1.5), max_steps=4).fit(module, loader(dtype=torch.float64))
    assert module.told == {0: pytest.approx([1.5 / 5] * 2), 1: [0.0, 0.0]}


def test_a_resumed_fit_is_the_same():
    """Without noise and with every sample in every batch nothing is left to chance."""

    def fit(resumed=None):
        module = Noted(network(), lr=0.05, betas=(0.9, 0.95))
        kept = ModelCheckpoint(".", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        data = loader(n=20, batch_size=20, dtype=torch.float64)
        trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=5, callbacks=[kept]).fit(module, data, ckpt_path=resumed)
        return parameters(module)

    whole = fit()
    again = fit("step=2.ckpt")
    assert all(torch.equal(again[name], p) for name, p in whole.items())


def test_the_noise_of_earlier_steps_is_in_the_checkpoint():
    module = Noted(network(), lr=0.05)
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.5), max_steps=3)
    fit.fit(module, loader(dtype=torch.float64))
    fit.save_checkpoint("a.ckpt")
    (state,) = torch.load("a.ckpt", weights_only=True)["optimizer_states"]
    expected = (1.5 / 5) ** 2 * (1 - 0.999**3)
    assert [one["noise_variance"] for one in state["state"].values()] == pytest.approx([expected] * 4)


def test_without_a_private_strategy_it_is_refused():
    with pytest.raises(ldp.PrivacyError, match=r"DPAdamBC was not told the noise .*DPStrategy"):
        trainer("auto", max_steps=1).fit(Regression(optimizer=ldp.DPAdamBC), loader())


def test_every_step_needs_to_be_told():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = ldp.DPAdamBC([p])
    optimizer.receive_noise(0.5)
    copy.deepcopy(optimizer)
    optimizer.step()
    with pytest.raises(ldp.PrivacyError, match="DPAdamBC was not told the noise"):
        optimizer.step()


def test_clipping_of_released_gradients_is_refused():
    with pytest.raises(ldp.PrivacyConfigurationError, match="gradient_clip_val=0.5 with the optimizer DPAdamBC"):
        trainer(gradient_clip_val=0.5).fit(Regression(optimizer=ldp.DPAdamBC), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0 of DPAdamBC: expected a number of at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) of DPAdamBC: expected two numbers"),
        ({"floor": 0.0}, "floor=0.0 of DPAdamBC: expected a positive"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 of DPAdamBC: expected a number"),
    ],
)
def test_arguments(settings, message):
    with pytest.raises(ldp.PrivacyConfigurationError, match=message):
        ldp.DPAdamBC([nn.Parameter(torch.ones(2))], **settings)


def test_any_optimizer_may_ask():
    assert isinstance(ldp.DPAdamBC([nn.Parameter(torch.ones(2))]), NoiseAware)
    assert not isinstance(torch.optim.Adam([nn.Parameter(torch.ones(2))]), NoiseAware)


class Digits(pl.LightningModule):
    """Leaves its optimizer to the command line."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        pass


def test_in_yaml(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    cli = DPLightningCLI(
        Digits,
        args=[
            "fit",
            "--data=lightning_dp.demos.digits.DigitsDataModule",
            "--optimizer=lightning_dp.DPAdamBC",
            "--optimizer.lr=0.005",
            "--optimizer.floor=1e-6",
            "--trainer.strategy.target_epsilon=3",
            "--trainer.max_steps=2",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
        ],
        save_config_callback=None,
    )
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is ldp.DPAdamBC
    assert (optimizer.defaults["lr"], optimizer.defaults["floor"]) == (0.005, 1e-6)
    assert cli.trainer.strategy.num_releases == 2
