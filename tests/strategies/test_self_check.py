"""The self-check: what it must catch, each with its own message, and what it must let pass."""

import copy
import logging
import random
import weakref
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_dp as ldp
from lightning_dp.bookkeeping import rules
from lightning_dp.bookkeeping.entries import Dense
from tests.models import Regression, loader, parameters, trainer, updates

UNSUPPORTED = ldp.UnsupportedModelError


def fit(module, data=None, **settings):
    dp = ldp.DPStrategy(**{"noise_multiplier": 1.0, **settings})
    trainer(dp, max_steps=2).fit(module, data or loader())
    return dp


def line_of(code, pattern):
    """Return a pattern with the file and the line of this file that holds some code."""
    lines = Path(__file__).read_text().splitlines()
    at = [k for k, line in enumerate(lines, 1) if code in line and "line_of" not in line]
    return pattern.format("|".join(f"test_self_check.py:{k} " for k in at).join(("(", ")")))


class Tagger(pl.LightningModule):
    """Token classification over ragged sequences, padded with the label -100."""

    def __init__(self, reduce):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
        self.reduce = reduce

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        token_loss = F.cross_entropy(self.net(ids).mT, labels, reduction="none", ignore_index=-100)
        return self.reduce(token_loss, labels != -100)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def ragged(pad_to=None):
    g = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 10, (int(n),), generator=g) for n in torch.randint(2, 9, (24,), generator=g)]

    def collate(batch):
        longest = pad_to or max(len(ids) for ids in batch)
        padded = [F.pad(ids, (0, longest - len(ids))) for ids in batch]
        labels = [F.pad(ids % 4, (0, longest - len(ids)), value=-100) for ids in batch]
        return torch.stack(padded), torch.stack(labels)

    return DataLoader(samples, batch_size=6, collate_fn=collate)


@pytest.mark.parametrize("pad_to", [None, 10])
def test_a_token_mean_over_ragged_lengths(pad_to):
    token_mean = Tagger(lambda loss, mask: (loss * mask).sum() / mask.sum())
    with pytest.raises(UNSUPPORTED, match=line_of("mask.sum())", r"\(c\).*rescaled.*{}.*lightning_dp.per_sample_mean")):
        fit(token_mean, ragged(pad_to))
    fit(Tagger(ldp.per_sample_mean), ragged(pad_to))


def test_a_token_mean_where_the_first_samples_have_one_length():
    data = ragged()
    data.dataset[:] = [ids[:2] if k % 16 else ids for k, ids in enumerate(data.dataset)]  # one in sixteen is longer
    assert {len(ids) for ids in data.dataset} != {2}
    token_mean = Tagger(lambda loss, mask: (loss * mask).sum() / mask.sum())
    with pytest.raises(UNSUPPORTED, match=r"\(c\).*rescaled"):
        fit(token_mean, data)


class Noisy(Regression):
    """A loss with noise in it, drawn anew for every sample in one of the ways of torch."""

    def __init__(self, draw, reduce=torch.mean):
        super().__init__(nn.Linear(3, 4))
        self.head, self.draw, self.reduce = nn.Linear(4, 3), draw, reduce

    def training_step(self, batch, batch_idx):
        x = batch[0]
        return self.reduce((self.head(self.draw(self.net(x))) - x).square().mean(1))


def one_hot_draw(h):
    return F.one_hot(torch.multinomial(h.softmax(1), 2, replacement=True), 4).sum(1) * h


DRAWS = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "randn": lambda h: h + torch.randn(h.shape[0], 4),
    "rand": lambda h: h + torch.rand(len(h), 1),
    "randint": lambda h: h * torch.randint(1, 9, (len(h),))[:, None],
    "normal": lambda h: torch.distributions.Normal(h, h.exp()).rsample(),
    "bernoulli": lambda h: h * torch.bernoulli(h.sigmoid().detach()),
    "multinomial": one_hot_draw,
    "in place": lambda h: h + torch.empty_like(h).normal_(),
    "two rows each": lambda h: h + torch.randn(2 * len(h), 4).unflatten(0, (-1, 2)).sum(1),
    "row first": lambda h: h + torch.randn(2, len(h), 4).flatten(0, 1).unflatten(0, (2, -1)).sum(0),
    "always dropout": lambda h: F.dropout(h, 0.5, training=True),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_loss_with_noise_in_it(draw):
    fit(Noisy(DRAWS[draw]))
    with pytest.raises(UNSUPPORTED, match=r"\(c\).*left out.*not the mean over the samples"):
        fit(Noisy(DRAWS[draw], torch.sum))


def test_noise_that_is_shared_out_among_the_samples():
    with pytest.raises(UNSUPPORTED, match=r"test_self_check.py:\d+.* a sample changes what .* for another sample"):
        fit(Noisy(lambda h: h[torch.randperm(len(h))] * h))


@pytest.mark.parametrize("lengths", [(2, 3, 9, 4), (2, 9, 3, 4), (3, 3, 8, 2)], ids=str)
def test_dropout_over_ragged_lengths(lengths):
    """Padded to the length of a longer neighbour, a sample draws other numbers, and that is no influence."""
    module = Tagger(ldp.per_sample_mean)
    module.net = nn.Sequential(nn.Embedding(10, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    samples = [torch.arange(n) for n in lengths]
    fit(module, DataLoader(samples, batch_size=3, collate_fn=ragged().collate_fn))
    coupled = Tagger(lambda loss, mask: ldp.per_sample_mean(loss, mask) + (loss.sum(1) * loss.sum(1).roll(1)).mean())
    coupled.net = module.net
    with pytest.raises(UNSUPPORTED, match=r"\(c\)"):
        fit(coupled, DataLoader(samples, batch_size=3, collate_fn=ragged().collate_fn))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_recurrent_layers(kind):
    """In the backward pass it is drawn once more, with equal draws for all samples as without."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = kind(3, 4, 2, dropout=0.5), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layers(x.expand(5, -1, -1))[0].mean(0))

    fit(Regression(Recurrent()))


def test_a_sum_declared_as_a_mean_and_the_reverse():
    class Sum(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return (self.net(x) - y).square().mean(1).sum()

    with pytest.raises(UNSUPPORTED, match=r"\(c\).*left out.*not the mean over the samples"):
        fit(Sum())
    fit(Sum(), loss_reduction="sum")
    with pytest.raises(UNSUPPORTED, match=r"\(c\).*left out.*not the sum over the samples"):
        fit(Regression(), loss_reduction="sum")


def test_a_token_of_another_sample():
    """All rows of the repeated token are equal, so that no value shows that samples take those of the first one."""

    class Borrowing(Regression):
        def __init__(self):
            super().__init__()
            self.token, self.places = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 3))

        def training_step(self, batch, batch_idx):
            x, y = batch
            frames = torch.stack([x, 2 * x], 1).flatten(0, 1)[:, None]  # [B * 2, 1, 3]
            tokens = torch.cat([self.token.expand(len(frames), 1, -1), frames], 1) + self.places[:2]
            return F.mse_loss(self.net(tokens[: len(x), 0] + tokens[:, 1].unflatten(0, (-1, 2)).sum(1)), y)

    with pytest.raises(UNSUPPORTED, match=r"\(c\).*neighbour in the batch was another.*'places'"):
        fit(Borrowing())


def test_a_contrastive_loss():
    class Contrastive(Regression):
        def training_step(self, batch, batch_idx):
            x = F.normalize(self.net(batch[0]))
            y = F.normalize(self.net(batch[0] + 0.1))
            return F.cross_entropy(x @ y.T, torch.arange(len(x)))

    with pytest.raises(UNSUPPORTED, match=line_of("cross_entropy(x @ y.T", r"\(c\).*changed.*other.*{}.*contrastive")):
        fit(Contrastive(nn.Linear(3, 8)))


def test_a_statistic_of_the_batch_in_the_loss():
    class Decorrelated(Regression):
        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return (out - out.mean(0)).square().mean()

    with pytest.raises(UNSUPPORTED, match=line_of("out - out.mean(0)", r"\(c\).*samples influence each other.*{}")):
        fit(Decorrelated())


def test_batch_normalisation_of_ones_own():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last((x - x.mean(0)) / (x.std(0) + 1))

    with pytest.raises(
        UNSUPPORTED, match=r"\(.*test_self_check.py:\d+\).*for another sample of the batch.*normalisation"
    ):
        fit(Regression(Norm()))


def test_control_flow_that_depends_on_the_batch():
    class Branches(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.mse_loss(self.net(x), y)
            return loss * 2 if x.sum() > self.threshold else loss

    data = loader()
    x = data.dataset.tensors[0]
    a, b, d = x[0].sum(), x[5].sum(), x[15].sum()  # the samples looked at: [a, a, b] against [d, a, b]
    module = Branches()
    module.threshold = float(a + b + (a + d) / 2)
    with pytest.raises(UNSUPPORTED, match=r"control flow (that )?depends on the batch"):
        fit(module, data)


def test_a_wrong_rule_for_one_sample(monkeypatch):
    def wrong(operation, input, weight, bias=None):
        file, split = operation.filing(weight), operation.split_output()
        shape = tuple(weight.shape)
        return (lambda g, x: file(Dense(torch.ones(split(g).shape[0], *shape)))), [input]

    monkeypatch.setitem(rules._RULES, F.linear, wrong)
    with pytest.raises(UNSUPPORTED, match=r"\(a\).*'net.weight' \(.* in the book, .* by autograd\).*loop"):
        fit(Regression(nn.Linear(3, 2, bias=False)))


def test_a_rule_that_is_wrong_for_several_samples_only(monkeypatch):
    right = rules._RULES[F.linear]

    def wrong(operation, input, weight, bias=None):
        record, saved = right(operation, input, weight, bias)
        return (lambda g, x: record(g * (1 + 0.3 * (len(g) > 1)), x)), saved

    monkeypatch.setitem(rules._RULES, F.linear, wrong)
    with pytest.raises(UNSUPPORTED, match=r"\(b\).*'net.weight'.*clipping_engine='loop'"):
        fit(Regression(nn.Linear(3, 2, bias=False)))


def test_a_buffer_that_follows_the_data():
    class Remembers(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(3))

        def training_step(self, batch, batch_idx):
            self.average.lerp_(batch[0].mean(0), 0.1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(UNSUPPORTED, match=r"\(d\).*writes into 'average', a buffer"):
        fit(Remembers())


def test_a_buffer_that_only_counts_is_no_matter():
    class Counts(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module = Counts()
    fit(module)
    assert float(module.steps) >= 2


class Teacher(Regression):
    """Learns from an average of its own weights, which its training step updates."""

    def __init__(self, of_data=False):
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.of_data = of_data

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                t.lerp_(p, 0.5)
            if self.of_data:
                self.teacher[0].bias += x.mean()
        return F.mse_loss(self.net(x), y) + F.mse_loss(self.net(x), self.teacher(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_an_average_of_weights_is_allowed_and_observed_without_a_trace():
    torch.manual_seed(0)
    module = Teacher().double()
    with torch.no_grad():
        module.teacher[0].weight.zero_()  # so that every update moves it
    reference, data = copy.deepcopy(module), loader(dtype=torch.float64, batch_size=20)
    trainer(ldp.DPStrategy(noise_multiplier=0, max_grad_norm=100.0), max_steps=2).fit(module, data)
    for _ in range(2):
        reference.zero_grad()
        reference.training_step(data.dataset.tensors, 0).backward()
        with torch.no_grad():
            for p in reference.net.parameters():
                p -= 0.1 * p.grad
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_weights_kept_in_a_range_by_the_training_step():
    class Kept(Regression):
        def training_step(self, batch, batch_idx):
            for p in self.net.parameters():
                p.data = p.data.clamp(-0.1, 0.1)
                p.data.mul_(1.0)
            return super().training_step(batch, batch_idx)

    module = Kept(nn.Linear(3, 2).double())
    reference, data = copy.deepcopy(module), loader(dtype=torch.float64, batch_size=20)
    fit(module, data, noise_multiplier=0, max_grad_norm=100.0)
    for _ in range(2):
        reference.zero_grad()
        reference.training_step(data.dataset.tensors, 0).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= p.grad
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_an_average_of_the_data_in_a_parameter():
    with pytest.raises(UNSUPPORTED, match=r"\(d\).*writes into 'teacher.0.bias', a buffer or parameter"):
        fit(Teacher(of_data=True))
    with pytest.raises(UNSUPPORTED, match="writes into the parameter 'teacher.*without the self-check"):
        fit(Teacher(), self_check=False)


def test_counters_flags_and_lists_are_as_they_were():
    class Remembers(Regression):
        def __init__(self):
            super().__init__()
            self.steps, self.ready, self.seen = 0, False, []

        def training_step(self, batch, batch_idx):
            self.steps += 1
            if not self.ready:
                self.ready = self.scale = True
            self.seen.append(len(batch[0]))
            del self.seen[3:]
            return super().training_step(batch, batch_idx) * (1 + len(self.seen))

    module = Remembers()
    seen = module.seen
    fit(module, loader(batch_size=20))
    assert module.steps == 2
    assert module.seen is seen
    assert seen == [20, 20]


def test_a_step_without_a_loss():
    class Nothing(Regression):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(UNSUPPORTED, match="returned no loss"):
        fit(Nothing())


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3)])
def test_dropout_passes(layer):
    fit(Regression(nn.Sequential(nn.Linear(3, 16), layer, nn.Linear(16, 2))))


def test_layers_dropped_at_random_are_all_observed():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.last = nn.Dropout(0.2), nn.Linear(3, 2)
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                if torch.rand([]) > 0.4:
                    x = x + self.dropout(layer(x)).tanh()
            return self.last(x)

    dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2)
    trainer(dp, max_steps=30).fit(Regression(Dropped(), lr=0.01), loader())
    assert dp.num_releases == 30


def test_every_layer_is_found_although_half_of_them_are_dropped():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(3, 3) for _ in range(8)), nn.Linear(3, 2)

        def forward(self, x):
            for layer in self.layers:
                if torch.rand([]) > 0.5:
                    x = x + layer(x).tanh()
            return self.last(x)

    for seed in range(3):
        torch.manual_seed(seed)
        dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2)
        trainer(dp, max_steps=10).fit(Regression(Dropped(), lr=0.01), loader())
        assert dp.num_releases == 10


def test_a_branch_of_a_later_step_is_checked_too():
    class Branches(Regression):
        def __init__(self, coupled):
            super().__init__()
            self.other, self.coupled = nn.Linear(3, 2), coupled

        def training_step(self, batch, batch_idx):
            if self.global_step < 2:
                return super().training_step(batch, batch_idx)
            out = self.other(batch[0])
            return F.mse_loss(out - out.mean(0) if self.coupled else out, batch[1])

    assert fit_steps(Branches(False), 4).num_releases == 4
    with pytest.raises(UNSUPPORTED, match=r"\(c\).*the gradient of a sample"):
        fit_steps(Branches(True), 4)


def test_a_step_that_is_run_again_begins_where_it_began():
    class Counts(Regression):
        def __init__(self):
            super().__init__(nn.Linear(3, 2).double())
            self.other, self.calls, self.took = nn.Linear(3, 2).double(), 0, []

        def training_step(self, batch, batch_idx):
            self.calls += 1
            out = self.net(batch[0])
            if self.calls % 4 == 0:
                self.took.append(self.calls)
                out = out + self.other(batch[0])
            return F.mse_loss(out, batch[1])

    module = Counts()
    trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=9).fit(module, loader(dtype=torch.float64, batch_size=20))
    assert module.calls == 9
    assert module.took == [4, 8]


@pytest.mark.parametrize(
    ("draw", "sequence"), [(np.random.rand, np.random.RandomState(5).rand), (random.random, random.Random(5).random)]
)
def test_a_step_that_is_run_again_draws_the_same_by_python_and_numpy(draw, sequence):
    class Draws(Regression):
        def __init__(self):
            super().__init__()
            self.other, self.drawn = nn.Linear(3, 2), []

        def training_step(self, batch, batch_idx):
            self.drawn.append(draw())
            return F.mse_loss((self.other if self.global_step > 1 else self.net)(batch[0]), batch[1])

    module = Draws()
    random.seed(5)
    np.random.seed(5)
    fit_steps(module, 4)
    assert len(module.drawn) > 4
    assert module.drawn == [sequence() for _ in module.drawn]


def test_a_late_branch_after_a_write_into_a_buffer():
    class Writes(Regression):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(3, 2)
            self.register_buffer("steps", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return F.mse_loss((self.other if self.global_step else self.net)(batch[0]), batch[1])

    with pytest.raises(UNSUPPORTED, match="took a branch that no step before it took, after it had written"):
        fit_steps(Writes(), 3)


def test_a_layer_whose_rows_come_in_another_order_in_a_later_branch():
    class Turns(Regression):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            x = batch[0][:, None] * torch.tensor([[1.0], [2.0]])
            late = self.global_step > 1
            out = self.net((x.transpose(0, 1) if late else x).flatten(0, 1))
            out = out.unflatten(0, (2, -1)).sum(0) if late else out.unflatten(0, (-1, 2)).sum(1)
            return F.mse_loss(self.other(out) if late else out, batch[1])

    with pytest.raises(UNSUPPORTED, match="'linear' of 'net.weight'.*training steps use it in different ways"):
        fit_steps(Turns(), 4)


def test_attributes_that_become_numbers_are_tensors_again():
    class Last(Regression):
        def __init__(self):
            super().__init__()
            self.last = torch.zeros(())

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.last = self.last + 1.0 if isinstance(self.last, torch.Tensor) else self.last + loss.item()
            self.last = float(self.last)
            return loss

    fit(Last())


def fit_steps(module, steps):
    dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2)
    trainer(dp, max_steps=steps).fit(module, loader())
    return dp


def test_about_one_gradient_of_the_whole_model_is_held_at_a_time(monkeypatch):
    held, most = {}, [0]

    def hold(self, name, whole):
        key = len(most)
        held[key] = whole.numel()
        weakref.finalize(whole, held.pop, key)
        most.append(sum(held.values()))
        return whole

    monkeypatch.setattr(ldp.bookkeeping.BookKeeping, "hold", hold)
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    fit(Regression(net))
    sizes = [p.numel() for p in net.parameters()]
    assert sum(sizes) <= max(most) <= sum(sizes) + 2 * max(sizes)


def test_it_can_be_switched_off():
    class Contrastive(Regression):
        def training_step(self, batch, batch_idx):
            x = F.normalize(self.net(batch[0]))
            return (x @ x.T).mean()

    with pytest.raises(UNSUPPORTED, match=r"\(c\)"):
        fit(Contrastive())
    fit(Contrastive(), self_check=False)


def test_it_leaves_no_trace():
    torch.manual_seed(0)
    first, second = Regression(nn.Linear(3, 2).double()), Regression(nn.Linear(3, 2).double())
    second.load_state_dict(first.state_dict())
    data = loader(dtype=torch.float64, batch_size=20)
    before = parameters(first)
    fit(first, data, noise_multiplier=0)
    fit(second, data, noise_multiplier=0, self_check=False)
    one, two = updates(first, before), updates(second, before)
    assert all(torch.equal(one[name], two[name]) for name in one)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(Scaled.apply(x, self.scale))


def test_the_loop_trains_what_the_book_cannot_see():
    from tests.models import clipped_mean

    module, data = Regression(Opaque().double()), loader(dtype=torch.float64, batch_size=20)
    with pytest.raises(UNSUPPORTED, match="'net.scale'.*clipping_engine='loop'"):
        fit(module, data)
    x, y = data.dataset.tensors
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), 20)
    before = parameters(module)
    dp = ldp.DPStrategy(noise_multiplier=0, clipping_engine="loop")
    trainer(dp, max_steps=1).fit(module, data)
    assert all(torch.allclose(-u, expected[name], rtol=1e-12) for name, u in updates(module, before).items())


def test_the_loop_and_the_book_agree():
    data = loader(dtype=torch.float64, batch_size=20)
    torch.manual_seed(0)
    first = Regression(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double())
    second = Regression(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double())
    second.load_state_dict(first.state_dict())
    trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=3).fit(first, data)
    trainer(ldp.DPStrategy(noise_multiplier=0, clipping_engine="loop"), max_steps=3).fit(second, data)
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_mixing_that_python_or_numpy_decide_now_and_then_is_found(draw):
    class Mixing(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            mixed = 0.7 * x + 0.3 * x.flip(0) if draw() < 0.5 else x
            return F.mse_loss(self.net(mixed), y)

    random.seed(2)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()
    assert draw() > 0.5  # nothing is mixed in the first look
    random.setstate(before[0])
    np.random.set_state(before[1])
    with pytest.raises(UNSUPPORTED, match="influence each other|no exact per-sample gradient"):
        fit(Mixing())


# ---- a sample that reaches only some of the others ---------------------------------------------------------------


class Reaching(nn.Module):
    """Features in which some samples reach others."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, h):
        return self.reach(h)


def from_the_last(h):
    return torch.cat([h[:1] + 0.1 * h[-1:], h[1:]])


def from_the_last_unseen(h):
    return torch.cat([h[:1] + 0.1 * h[-1:].detach(), h[1:]])


def by_the_largest(h):
    return h / h.detach().abs().amax()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reach", [from_the_last, from_the_last_unseen, by_the_largest])
def test_a_sample_that_reaches_only_some_others_is_refused(reach, seed):
    def module(reach):
        return Regression(nn.Sequential(nn.Linear(3, 4), Reaching(reach), nn.Linear(4, 2)))

    with pytest.raises(UNSUPPORTED, match=r"a sample changes what|neighbour in the batch|for another sample"):
        fit(module(reach), loader(n=40, seed=seed))
    fit(module(lambda h: h), loader(n=40, seed=seed))


def looked_at(*layers, **settings):
    """Return how many examples a model runs on beyond those that it is trained with, which are all there are."""
    sizes = []  # not of the module, whose attributes are put back

    class Counted(Regression):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    strategy = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=64, **settings)
    net = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))
    trainer(strategy, max_steps=1).fit(Counted(net), loader(n=20, batch_size=20))
    return sum(sizes) - 20


def test_a_model_that_draws_nothing_is_checked_on_fewer_examples():
    """No pass finds out what three draw, and the first of those that compare is that of property (b): six fewer."""
    still, drawing = (looked_at(*layers) - looked_at(*layers, self_check=False) for layers in ((), [nn.Dropout(0.3)]))
    assert 0 < still == drawing - 6


@pytest.mark.parametrize(("seconds", "said"), [(0.0, 1), (60.0, 0)])
def test_it_is_said_what_takes_so_long(seconds, said, monkeypatch, caplog):
    monkeypatch.setattr("lightning_dp.strategies.observing._LONG", seconds)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(Regression())
    assert sum("is checked on the model before the first step" in message for message in caplog.messages) == said


class MixedFromThreeOn(Regression):
    """Couples samples where it draws: in training mode, and in batches of three or more alone."""

    def __init__(self):
        super().__init__(nn.Linear(3, 1))

    def training_step(self, batch, batch_idx):
        y, share = self.net(batch[0]), 1.0
        if self.training and len(y) > 2:
            share = float(torch.rand(()))
        return (share * y + (1 - share) * y.roll(1, 0)).square().mean()


def test_what_is_drawn_from_three_samples_on_hides_no_coupling():
    with pytest.raises(UNSUPPORTED, match=r"\(c\)"):
        fit(MixedFromThreeOn())
