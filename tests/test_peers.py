"""Ways in which private training is known to go wrong without a word, each excluded through a Trainer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_dp as ldp
from tests.models import Regression, ZeroGradient, clipped_mean, loader, parameters, trainer
from tests.strategies.reference import private_fit, whole

BOUND = 0.5


class Model(pl.LightningModule):
    """Any network with a loss of its outputs, in float64; plain SGD of rate 1."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net.double(), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class TiedLanguageModel(nn.Module):
    """An embedding and a head that share their weight, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle(self.middle(self.embedding(ids)).tanh()))


def next_token(net, batch):
    ids, mask = batch[:, :-1], batch[:, 1:] > 0
    losses = F.cross_entropy(net(ids).mT, batch[:, 1:], reduction="none")
    return ldp.per_sample_mean(losses, mask)


def ragged():
    """Sequences of unequal lengths, padded with 0; many ids are repeated."""
    g = torch.Generator().manual_seed(0)
    return [F.pad(torch.randint(1, 7, (int(n),), generator=g), (0, 8 - int(n))) for n in (2, 8, 3, 5, 7, 4)]


def pictures():
    g = torch.Generator().manual_seed(0)
    return list(
        torch.randn(6, 2, 4, 4, generator=g, dtype=torch.float64)
        * torch.tensor(10.0).pow(torch.arange(6) - 3)[:, None, None, None]
    )


def steep(net, batch):
    return net(batch).flatten(1).square().sum(1).mean()


NEIGHBOURS = {
    "tied and reused weights, sequences of unequal lengths": (TiedLanguageModel, next_token, ragged),
    "circular padding": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), steep, pictures),
    "reflected padding": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), steep, pictures),
    "grouped convolution": (lambda: nn.Conv2d(2, 4, 3, groups=2), steep, pictures),
    "padding index": (lambda: nn.Embedding(7, 3, padding_idx=0), steep, ragged),
    "bag of repeated ids": (lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=0), steep, ragged),
}


def released_sum(build, loss, samples):
    torch.manual_seed(0)
    module = Model(build(), loss)
    data = DataLoader(samples, batch_size=len(samples))
    private_fit(module, data, steps=1, strategy={"max_grad_norm": BOUND, "max_physical_batch_size": 4})
    return torch.cat([p.grad.flatten() for p in module.parameters()]) * len(samples)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_one_example_moves_the_sum_by_the_bound_at_most(name):
    """Sensitivity: norms that are taken of something else than what is summed show here, whatever the reason."""
    build, loss, samples = NEIGHBOURS[name]
    samples = samples()
    everything, moved = released_sum(build, loss, samples), []
    for k in range(len(samples)):
        moved.append(float((everything - released_sum(build, loss, samples[:k] + samples[k + 1 :])).norm()))
    assert max(moved) == pytest.approx(BOUND, rel=1e-9), "the largest gradient is clipped to the bound, not below it"
    assert all(m <= BOUND * (1 + 1e-9) for m in moved)


class Drawn(Regression):
    """Notes the examples of every logical batch, and what was released of them at which parameters."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2).double())
        self.rows, self.steps = [], []

    def on_train_batch_start(self, batch, batch_idx):
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append((batch[0].clone(), batch[1].clone()))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        x, y = (torch.cat(column) for column in zip(*self.rows, strict=True))
        self.steps.append((parameters(self), x, y, {name: p.grad.clone() for name, p in self.named_parameters()}))


def test_a_shuffled_loader_is_sampled_by_poisson_and_the_sum_divided_by_the_expected_size():
    """Neither are the user's own batches used with accounting for others, nor is the sum divided by the drawn size."""
    data, module = loader(n=40, batch_size=20, dtype=torch.float64), Drawn()
    dp = ldp.DPStrategy(noise_multiplier=0, max_physical_batch_size=7)
    trainer(dp, max_steps=13).fit(module, data)
    sizes = set()
    for before, x, y, released in module.steps[1:]:  # the first step also looks at the model
        twin = Drawn()
        twin.load_state_dict(before)
        mean = clipped_mean(twin, lambda i, x=x, y=y: (x[i : i + 1], y[i : i + 1]), len(x))
        for name, g in mean.items():
            torch.testing.assert_close(released[name], g * len(x) / 20, rtol=1e-9, atol=1e-12)
        assert len(torch.unique(x, dim=0)) == len(x)
        sizes.add(len(x))
    assert len(sizes) > 1  # all alike with probability 1e-10


class OwnLinear(nn.Linear):
    pass


class OwnNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Uncommon(nn.Module):
    """Layers that are no layers of torch, registered in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.last, self.norm, self.root = OwnLinear(4, 2), OwnNorm(4), nn.RMSNorm(4)
        self.volume, self.first = nn.Conv3d(1, 1, 1), nn.Linear(3, 4)
        self.raw = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x):
        h = self.norm(self.first(x)) + self.raw
        return self.last(self.root(self.volume(h[:, None, None, None]).flatten(1)))


def test_every_parameter_is_trained_exactly():
    """None is dropped for its kind, for its place in the registration, or with a warning only."""
    module, data = Regression(Uncommon().double()), whole()
    x, y = data.dataset.tensors
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), len(x))
    private_fit(module, data, steps=1)
    for name, p in module.named_parameters():
        assert float(expected[name].norm()) > 0
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-13)


def test_a_parameter_first_used_in_a_later_step_is_not_dropped():
    class Later(Regression):
        def __init__(self):
            super().__init__()
            self.extra, self.late = nn.Parameter(torch.ones(2)), False

        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return F.mse_loss(out * self.extra if self.late or self.global_step else out, batch[1])

    module, data = Later().double(), whole()
    x, y = data.dataset.tensors
    gradients = []

    class Reference(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.late = trainer.global_step > 0
            gradients.append(clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), len(x)))
            module.late = False

        def on_before_optimizer_step(self, trainer, module, optimizer):
            for name, p in module.named_parameters():
                torch.testing.assert_close(p.grad, gradients[-1][name], rtol=1e-10, atol=1e-13)

    trainer(ldp.DPStrategy(noise_multiplier=0.0), callbacks=[Reference()]).fit(module, data)
    assert [float(g["extra"].norm()) > 0 for g in gradients] == [False, True, True]


@pytest.mark.parametrize("n", [93, 99, 105, 117])
def test_no_step_of_an_epoch_is_lost_to_rounding(n):
    """1 / (1 / n) is below n in floating point for some n."""
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3), max_epochs=1, max_steps=-1)
    fit.fit(ZeroGradient(), loader(n=n, batch_size=1))
    assert fit.strategy.num_releases == fit.num_training_batches == n


@pytest.mark.parametrize("size", [1, 3, 20_000])
def test_the_noise_of_a_parameter_does_not_depend_on_how_many_there_are(size):
    """One bound for all parameters together: the standard deviation is that of the bound, for each of them."""
    net = nn.ParameterList([nn.Parameter(torch.zeros(60_000 // size)) for _ in range(min(size, 300))])
    module = ZeroGradient(nn.Linear(3, 2))
    module.more = net
    dp = ldp.DPStrategy(noise_multiplier=3.0, max_grad_norm=0.2)
    trainer(dp, max_steps=1).fit(module, loader(batch_size=5))
    noise = torch.cat([p.grad.flatten() for p in net])
    assert float(noise.std()) == pytest.approx(3.0 * 0.2 / 5, rel=10 / len(noise) ** 0.5)
