"""A fit by hand, to compare a Trainer's with: a loop of autograd.grad over the samples, and the module's own optimizer.

The batch is the whole dataset (sample rate 1) and there is no noise, so that nothing is left to chance.
"""

import copy

import torch
from torch import nn

import lightning_dp as ldp
from tests.models import Regression, clipped_mean, loader, parameters, trainer


def network(dtype=torch.float64):
    """Return a network with a normalisation, an in-place activation and several shapes of parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def whole(n=12, **settings):
    """Return a loader whose batches hold every sample."""
    return loader(n=n, batch_size=n, dtype=torch.float64, **settings)


def by_hand(module, data, steps=3, *, optimizer=None, schedule=None, max_grad_norm=1.0, on_a_copy=True):
    """Return the parameters after some steps by hand.

    ``optimizer(module)`` makes the optimizer, by default the module's own; ``schedule(optimizer, module)`` what is
    called after every step.
    """
    module = copy.deepcopy(module) if on_a_copy else module
    x, y = data.dataset.tensors
    stepper = optimizer(module) if optimizer else module.configure_optimizers()
    after = schedule(stepper, module) if schedule else lambda: None
    for _ in range(steps):
        mean = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), len(x), max_grad_norm)
        for name, p in module.named_parameters():
            p.grad = mean.get(name)
        stepper.step()
        after()
    return parameters(module)


def private_fit(module, data, steps=3, strategy=None, target=None, validate=None, **settings):
    """Fit ``module`` (or ``target``, which holds it) privately without noise, and return the trainer."""
    dp = ldp.DPStrategy(**{"noise_multiplier": 0, "max_physical_batch_size": 5, **(strategy or {})})
    fit = trainer(dp, **{"max_steps": steps, **settings})
    fit.fit(module if target is None else target, data, validate)
    assert dp.num_releases == fit.global_step == steps
    return fit


def assert_equal(module, expected, tolerance=1e-12):
    """Assert that the parameters are the expected ones, and that they are finite."""
    found = {name.replace("_orig_mod.", ""): p for name, p in parameters(module).items()}
    assert set(found) == set(expected)
    for name, p in expected.items():
        error = float((found[name].double() - p.double()).norm())
        assert error <= tolerance * max(1.0, float(p.double().norm())), f"{name} is off by {error}"


def assert_fit_is_right(module, data=None, steps=3, *, by=None, tolerance=1e-12, **settings):
    """Fit privately and by hand, assert that both moved and agree, and return the trainer."""
    data = data if data is not None else whole()
    before, expected = parameters(module), by_hand(module, data, steps, **(by or {}))
    assert any(not torch.equal(before[name], p) for name, p in expected.items()), "nothing would be learnt"
    fit = private_fit(module, data, steps, **settings)
    assert_equal(module, expected, tolerance)
    return fit


__all__ = ["Regression", "assert_equal", "assert_fit_is_right", "by_hand", "network", "private_fit", "whole"]
