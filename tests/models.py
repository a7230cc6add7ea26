"""Small LightningModules, loaders and trainers for the tests."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp


class Regression(pl.LightningModule):
    """Mean squared error of any network; plain SGD of rate 1, so that an update is minus the gradient."""

    def __init__(self, net=None, lr=1.0, optimizer=torch.optim.SGD):
        super().__init__()
        self.net = net if net is not None else nn.Linear(3, 2)
        self.lr, self.optimizer = lr, optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x), y))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class ZeroGradient(Regression):
    """A loss that depends on the parameters, with gradient zero: an update is noise alone."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net(batch[0]).mean()


def loader(n=20, batch_size=5, dtype=torch.float32, seed=0, shuffle=True, **kwargs):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=dtype), torch.randn(n, 2, generator=g, dtype=dtype)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle, **kwargs)


def trainer(strategy=None, **kwargs):
    settings = {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": "callbacks" in kwargs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(strategy=strategy or ldp.DPStrategy(noise_multiplier=1.0), **{**settings, **kwargs})


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def updates(module, before):
    return {name: p.detach() - before[name] for name, p in module.named_parameters()}


def clipped_mean(module, batch_of, num_samples, max_grad_norm=1.0, loss=None, automatic=False):
    """The reference: clip each sample's autograd gradient, add, divide by the number of samples."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in trained.items()}
    for i in range(num_samples):
        value = loss(batch_of(i)) if loss else module.training_step(batch_of(i), 0)
        grads = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, trained.values(), strict=True)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        factor = max_grad_norm / (norm + 0.01) if automatic else min(1.0, max_grad_norm / float(norm))
        for n, g in zip(trained, grads, strict=True):
            total[n] += factor * g
    return {n: t / num_samples for n, t in total.items()}
