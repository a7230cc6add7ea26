"""The terms of the improvement against explicit Hessians, and its table."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_dp as ldp
from lightning_dp.forecasting.improvement import Curvature, write_improvement
from tests.models import Regression, loader, parameters, trainer

N = 10


class Logistic(Regression):
    """Cross entropy of a linear layer: a loss whose Hessian depends on the weights."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2).double())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y.argmax(1))


def data(n=N, seed=3, batch_size=4):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def planned(model, public, private=None, improvement=True, callbacks=None, show=False, **settings):
    settings = settings if "target_epsilon" in settings else {"noise_multiplier": 0, **settings}
    dp = ldp.DPStrategy(max_physical_batch_size=3, **settings)
    callbacks = [ldp.PublicPretraining(public, switch=0.5)] if callbacks is None else callbacks
    fit = trainer(dp, max_steps=8, callbacks=callbacks)
    return ldp.plan(
        fit, model, private or loader(n=40, batch_size=10, dtype=torch.float64), improvement=improvement, show=show
    )


def explicit(model, public, max_grad_norm=1.0):
    """|G|^2, G'HG, tr(HS), tr(H) and the mean clipping factor, by an explicit Hessian."""
    x, y = public.dataset.tensors
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w, rows=slice(None)):
        parts = dict(zip(shapes, w.split([s.numel() for s in shapes.values()]), strict=True))
        named = {name: part.view(shapes[name]) for name, part in parts.items()}
        out = torch.func.functional_call(model.net, {n.removeprefix("net."): p for n, p in named.items()}, x[rows])
        wanted = y[rows]
        return F.cross_entropy(out, wanted.argmax(1)) if isinstance(model, Logistic) else F.mse_loss(out, wanted)

    hessian = torch.autograd.functional.hessian(loss, flat)
    gradients = torch.stack(
        [torch.autograd.functional.jacobian(lambda w, i=i: loss(w, slice(i, i + 1)), flat) for i in range(len(x))]
    )
    mean = gradients.mean(0)
    covariance = (gradients - mean).T @ (gradients - mean) / len(x)
    clipping = (max_grad_norm / gradients.norm(dim=1)).clamp(max=1).mean()
    return [
        float(v)
        for v in (mean @ mean, mean @ hessian @ mean, (hessian @ covariance).trace(), hessian.trace(), clipping)
    ]


@pytest.mark.parametrize("kind", [Logistic, lambda: Regression(nn.Linear(3, 2).double())])
def test_the_terms_are_those_of_an_explicit_hessian(kind):
    model, public = kind(), data()
    before, expected = parameters(model), explicit(model, public)
    found = planned(model, public, max_grad_norm=0.7 if kind is Logistic else 1.0)
    if kind is Logistic:
        expected = explicit(model, public, 0.7)
    c = found.improvement.curvature
    exact = [c.signal, c.along, c.clipping]
    assert exact == pytest.approx([expected[0], expected[1], expected[4]], rel=1e-10)
    assert [c.covariance, c.trace] == pytest.approx(expected[2:4], rel=0.35)  # 32 random directions
    assert c.num_examples == N
    assert all(torch.equal(p, before[name]) for name, p in parameters(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_the_two_traces_converge():
    """With every direction of signs that there is the estimates are exact but for chance; many are close."""
    from lightning_dp.clipping import resolve_clipping
    from lightning_dp.coverage.curvature import Examples, curvature

    model, public = Logistic(), data()
    x, y = public.dataset.tensors
    examples = Examples(
        loss=lambda batch: model.training_step(batch, 0),
        singles=[lambda i=i: (x[i : i + 1], y[i : i + 1]) for i in range(N)],
        chunks=[(lambda: (x[:4], y[:4]), 4), (lambda: (x[4:], y[4:]), 6)],
    )
    found = curvature(list(model.parameters()), examples, resolve_clipping("flat", 1.0), num_probes=300)
    expected = explicit(model, public)
    assert [found.covariance, found.trace] == pytest.approx(expected[2:4], rel=0.1)
    assert [found.signal, found.along, found.clipping] == pytest.approx([*expected[:2], expected[4]], rel=1e-10)


def test_the_gain_is_that_of_a_quadratic_loss():
    """A quadratic loss: the mean improvement over many random steps, and no better learning rate or batch size."""
    torch.manual_seed(0)
    a, dim, count, batch, noise, c = torch.randn(4, 4), 4, 4000, 5, 3.0, 1.0
    hessian = (a @ a.T + torch.eye(4)).double()
    weights, centres = torch.ones(dim).double(), torch.randn(200, dim).double()
    gradients = (weights - centres) @ hessian  # of 0.5 (w - c_i)' H (w - c_i)
    mean = gradients.mean(0)
    spread = (gradients - mean).T @ (gradients - mean) / 200
    forms = [float(v) for v in (mean @ mean, mean @ hessian @ mean, (hessian @ spread).trace(), hessian.trace())]
    terms = Curvature(*forms, clipping=c, num_examples=200, num_probes=1)
    step = terms.step(batch, noise)

    def loss(w):
        d = w[..., None, :] - centres.mean(0)
        return 0.5 * (d @ hessian * d).sum(-1).squeeze(-1)

    chosen = torch.randint(0, 200, (count, batch))
    released = gradients[chosen].mean(1) + noise / batch * torch.randn(count, dim).double()
    gains = loss(weights) - loss(weights - step.learning_rate * released)
    assert float(gains.mean()) == pytest.approx(step.per_step, abs=5 * float(gains.std()) / count**0.5)
    for factor in (0.9, 1.1):
        rate = step.learning_rate * factor
        other = rate * forms[0] - rate**2 / 2 * (forms[1] + forms[2] / batch + noise**2 * forms[3] / batch**2)
        assert other < step.per_step
        best = terms.best_batch_size(noise)
        assert terms.step(best * factor, noise).per_example < terms.step(best, noise).per_example
    assert step.share_of_noise == pytest.approx(step.decelerator / (step.along + step.covariance + step.decelerator))


def test_clipping_shortens_the_signal_not_the_noise():
    """Half the factor, with half the noise, is the same step at twice the learning rate."""
    whole, half = (Curvature(2.0, 3.0, 4.0, 5.0, c, 10, 1) for c in (1.0, 0.5))
    one, other = whole.step(8, 6.0), half.step(8, 3.0)
    assert (one.per_example, one.decelerator) == pytest.approx((other.per_example, other.decelerator))
    assert other.learning_rate == pytest.approx(2 * one.learning_rate)


def test_without_upward_curvature_there_is_no_best():
    terms = Curvature(1.0, -1.0, 0.5, 2.0, 1.0, 10, 1)
    assert terms.best_batch_size(1.0) is None
    assert (terms.step(100, 1.0).per_example, terms.step(100, 1.0).per_step, terms.step(100, 1.0).learning_rate) == (
        None,
        None,
        None,
    )


def test_the_table_has_the_noise_of_every_batch_size(capsys):
    found = planned(Logistic(), data(), show=True, target_epsilon=2.0, target_delta=1e-3)
    improvement = found.improvement
    noises = {option.batch_size: option.noise_multiplier for option in found.forecast.batches}
    assert {step.batch_size: step.noise_std for step in improvement.steps} == noises  # max_grad_norm is 1
    shown = capsys.readouterr().out
    assert "What a private step improves, by batch size" in shown
    assert f"{improvement.best_batch_size:,.4g}" in shown
    assert improvement.best_batch_size == improvement.curvature.best_batch_size(found.noise_multiplier)


def test_given_noise_is_kept_for_all_batch_sizes():
    found = planned(Logistic(), data()).improvement
    assert [step.batch_size for step in found.steps] == [2.5, 5, 10, 20, 40]
    assert {step.decelerator for step in found.steps} == {0.0}


def test_files(tmp_path):
    found = planned(Logistic(), data(), improvement=str(tmp_path / "terms.json")).improvement
    written = json.loads((tmp_path / "terms.json").read_text())
    assert written["curvature"]["trace"] == found.curvature.trace
    assert [row["per_example"] for row in written["steps"]] == [step.per_example for step in found.steps]
    write_improvement(found, tmp_path / "terms.md")
    lines = (tmp_path / "terms.md").read_text().splitlines()
    assert lines[0].startswith("| batch size | noise std |")
    assert lines[1].count("---:") == lines[0].count("|") - 1
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"improvement='terms.txt': expected True, or a file"):
        planned(Logistic(), data(), improvement="terms.txt")


def test_refusals():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data().dataset)

    with pytest.raises(ldp.PrivacyConfigurationError, match="improvement without public data"):
        planned(Logistic(), data(), callbacks=[])
    with pytest.raises(ldp.PrivacyConfigurationError, match="public data that has no index"):
        planned(Logistic(), DataLoader(Stream(), batch_size=2))
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"improvement with clipping=per_layer \(equal bounds\)"):
        planned(Logistic(), data(), clipping="per_layer")
    users = ldp.PrivateDataset(data(40).dataset, user_ids=list(range(20)) * 2, examples_per_user=2)
    with pytest.raises(ldp.PrivacyConfigurationError, match="improvement with examples_per_user=2"):
        planned(Logistic(), data(), DataLoader(users, batch_size=10))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class OnlyOnce(Logistic):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(Once.apply(self.net(x)), y.argmax(1))

    with pytest.raises(ldp.UnsupportedModelError, match="cannot be differentiated twice"):
        planned(OnlyOnce(), data())

    class Silent(Logistic):
        def training_step(self, batch, batch_idx):
            return None if not self.training else super().training_step(batch, batch_idx)

    with pytest.raises(ldp.UnsupportedModelError, match="returned no loss for a public example"):
        planned(Silent(), data())
