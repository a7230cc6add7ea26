"""How far the released sum moves when one sample is added, for samples that are built to move it as far as possible.

Nothing of the library is asked for the bound but ``sensitivity``: the sums are those that are released without noise.
"""

import math

import pytest
import torch
from torch import nn

import lightning_dp as ldp
from lightning_dp.bookkeeping import Book
from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_step import PrivateStep
from tests.models import Regression, loader, parameters, trainer

SHAPES = {"one.weight": (4, 3), "one.bias": (4,), "two.weight": (2, 4), "two.bias": (2,)}
CLIPPINGS = {
    "flat": ldp.FlatClipping,
    "automatic": ldp.AutomaticClipping,
    "psac": ldp.PSACClipping,
    "psac, small r": lambda c: ldp.PSACClipping(c, r=1e-4),
    "adaptive": ldp.AdaptiveClipping,
    "per_layer": ldp.PerLayerClipping,
    "per_layer, by size": lambda c: ldp.PerLayerClipping(c, budgets="size"),
    "per_layer, every parameter": lambda c: ldp.PerLayerClipping(c, groups={name: [name] for name in SHAPES}),
}


def gradient(norm, only=SHAPES, dtype=torch.float64):
    """One sample's gradient of a norm, over some parameters, as a mapping of ``[1, *shape]``."""
    g = torch.Generator().manual_seed(1)
    parts = {name: torch.randn(1, *shape, generator=g, dtype=dtype) for name, shape in SHAPES.items()}
    parts = {name: part * (name in only) for name, part in parts.items()}
    length = math.sqrt(sum(float(part.square().sum()) for part in parts.values()))
    return {name: part * (norm / length) for name, part in parts.items()}


def spread(norms):
    """One sample's gradient whose parameters have these norms."""
    return {name: gradient(norm, [name])[name] for name, norm in zip(SHAPES, norms, strict=True)}


def odd(value, name="one.bias"):
    """A gradient of norm 5 with one element that is no number."""
    parts = gradient(5.0)
    parts[name].view(-1)[0] = value
    return parts


ADVERSARIAL = {
    "zero": gradient(0.0),
    "tiny": gradient(1e-150),
    "short": gradient(1e-2),
    "near the greatest factor": gradient(math.sqrt(0.1) - 0.1),
    "just below the bound": gradient(0.7 * (1 - 1e-12)),
    "at the bound": gradient(0.7),
    "just above the bound": gradient(0.7 * (1 + 1e-12)),
    "long": gradient(1e3),
    "huge": gradient(1e150),
    "too long to be squared": gradient(1e200),
    "all in one weight": gradient(1e3, ["one.weight"]),
    "all in one bias": gradient(1e3, ["two.bias"]),
    "every layer and every parameter at a bound": spread([0.7 / 2] * 4),
    "every group beyond a bound": spread([1e3, 1e-3, 1e3, 1e6]),
    "nan": odd(float("nan")),
    "inf": odd(float("inf")),
    "-inf in a weight": odd(-float("inf"), "two.weight"),
}


def released(clipping, samples, chunk=4, dtype=torch.float64):
    """The sum that is released of these samples, without noise, collected in physical batches."""
    held = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    step = PrivateStep(held, SecretRandom(), mean_loss=False)
    step.begin(Mechanism(0.0, clipping, 0.5, 1.0))
    for at in range(0, len(samples), chunk):
        rows = samples[at : at + chunk]
        entries = {name: [Dense(torch.cat([row[name] for row in rows]).to(dtype))] for name in SHAPES}
        step.collect(Book(len(rows), entries), len(rows))
    step.release()
    return {name: p.grad.double() for name, p in held.items()}


def distance(one, two):
    return math.sqrt(sum(float((one[name] - two[name]).square().sum()) for name in one))


def neighbours():
    return [gradient(norm) for norm in (0.1, 2.0, 0.7, 30.0, 1e-3)]


@pytest.mark.parametrize("kind", CLIPPINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sample_moves_the_sum_by_no_more_than_the_sensitivity(kind, dtype):
    clipping, moved = CLIPPINGS[kind](0.7), {}
    base = released(clipping, neighbours(), dtype=dtype)
    rounding = 1e-5 if dtype is torch.float32 else 1e-12
    for name, sample in ADVERSARIAL.items():
        for place in (0, 3, 5):
            samples = [*neighbours()[:place], sample, *neighbours()[place:]]
            moved[name] = distance(base, released(clipping, samples, dtype=dtype))
            assert moved[name] <= clipping.sensitivity * (1 + rounding), name
    assert clipping.sensitivity == 0.7
    assert max(moved.values()) >= 0.69  # the bound is reached: it is none that is far above what happens
    assert moved["zero"] == 0.0


@pytest.mark.parametrize("kind", CLIPPINGS)
def test_a_sample_that_is_replaced_moves_it_by_no_more_than_twice_as_much(kind):
    clipping = CLIPPINGS[kind](0.7)
    for sample in ADVERSARIAL.values():
        opposite = {name: -part for name, part in sample.items()}
        one, two = (released(clipping, [*neighbours(), row]) for row in (sample, opposite))
        assert distance(one, two) <= 2 * clipping.sensitivity * (1 + 1e-12)


@pytest.mark.parametrize("kind", CLIPPINGS)
def test_what_is_not_finite_stays_out_of_everybody_elses_sum(kind):
    clipping = CLIPPINGS[kind](0.7)
    base = released(clipping, neighbours())
    per_group = kind.startswith("per_layer")
    for value in (float("nan"), float("inf")):
        found = released(clipping, [*neighbours(), odd(value)])
        assert all(bool(part.isfinite().all()) for part in found.values())
        assert torch.equal(found["one.bias"], base["one.bias"])
        assert per_group or distance(found, base) == 0.0


@pytest.mark.parametrize("kind", CLIPPINGS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_physical_batches_do_not_change_the_sum(kind, chunk):
    clipping, samples = CLIPPINGS[kind](0.7), [*neighbours(), gradient(4.0, ["one.bias"])]
    assert distance(released(clipping, samples, chunk), released(clipping, samples, len(samples))) <= 1e-14


def test_groups_are_clipped_where_gradients_are_not_materialised():
    """A group of ghost norms: the sum of the book's entries, against the gradients by hand."""
    a, g = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    bias = torch.randn(3, 2, dtype=torch.float64)
    held = {"one.weight": nn.Parameter(torch.zeros(4, 3).double()), "two.bias": nn.Parameter(torch.zeros(2).double())}
    step = PrivateStep(held, SecretRandom(), mean_loss=False)
    step.begin(Mechanism(0.0, ldp.PerLayerClipping(1.0), 0.5, 1.0))
    step.collect(Book(3, {"one.weight": [Outer(a, g)], "two.bias": [Dense(bias)]}), 3)
    step.release()
    for name, dense in (("one.weight", torch.einsum("btp,btd->bpd", g, a)), ("two.bias", bias)):
        norms = dense.flatten(1).norm(dim=1)
        factor = (math.sqrt(0.5) / norms).clamp(max=1)
        assert torch.allclose(held[name].grad, torch.einsum("b,b...->...", factor, dense), rtol=1e-12)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "psac", "per_layer", "adaptive"])
@pytest.mark.parametrize("scale", [0.0, 1e6])
def test_in_a_fit(clipping, scale):
    """The last sample of the data is added: all that a fit releases moves by no more than the bound."""

    def total(n):
        data = loader(n=8, batch_size=8, dtype=torch.float64)
        x, y = (t.clone() for t in data.dataset.tensors)
        x[-1], y[-1] = x[-1] * scale, y[-1] * scale
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        module = Regression(net)
        held = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:n], y[:n]), batch_size=n)
        dp = ldp.DPStrategy(
            noise_multiplier=0, clipping=clipping, max_grad_norm=0.3, target_delta=0.01, self_check=False
        )
        before = parameters(module)
        trainer(dp, max_steps=1).fit(module, held)
        return {name: (before[name] - p.detach()) * n for name, p in module.named_parameters()}

    assert 0 < distance(total(8), total(7)) <= 0.3 * (1 + 1e-9)
