"""Users as units: what one adds, with all their rows, is clipped as one, whatever the model, the loss and the engine.

The oracle is a loop over the users with autograd in float64: the gradient of the loss of a batch that holds one user's
rows alone, clipped, added, and divided by the number of users. Sample rate 1 and no noise leave nothing to chance but
which rows a user gives, and those are read from the batches that were trained on.
"""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import lightning_dp as ldp
from lightning_dp.summary import print_summary
from tests.accounting import oracles
from tests.models import Regression, ZeroGradient, trainer

IDS = [3, 1, 1, 2, 2, 2, 3, 3, 3, 3, 5, 9, 9]
"""Five users, with one to five examples each."""
USERS = 5


def rows_of(shape, ids=IDS, vocabulary=None):
    """A data set whose examples carry their number, to know later which were used."""
    g = torch.Generator().manual_seed(1)
    n = len(ids)
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    if vocabulary:
        x = torch.randint(vocabulary, (n, *shape), generator=g)
    return TensorDataset(x, torch.randn(n, 2, generator=g, dtype=torch.float64), torch.arange(n))


def users(m=1, ids=IDS, batch_size=None, data=None, partition=None, **kwargs):
    data = data or rows_of((3,), ids)
    private = ldp.PrivateDataset(data, user_ids=ids, examples_per_user=m, partition=partition)
    return DataLoader(private, batch_size=batch_size or m * len(set(ids)), shuffle=True, **kwargs)


class Mean(pl.LightningModule):
    """The mean over the rows; remembers which it saw."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Linear(3, 2).double()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[-1].tolist())
        return self.loss(batch)

    def loss(self, batch):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Sum(Mean):
    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean(1).sum()


class Pooled(Mean):
    """The rows of a user are averaged inside the model: they influence each other, users do not."""

    def __init__(self, m):
        super().__init__()
        self.m, self.pooled = m, nn.Linear(3, 4).double()
        self.net = nn.Linear(4, 2).double()

    def loss(self, batch):
        x = F.relu(self.pooled(batch[0])).unflatten(0, (-1, self.m)).mean(1)
        return F.mse_loss(self.net(x), batch[1].unflatten(0, (-1, self.m))[:, 0])


class Contrast(Mean):
    """A loss that compares a user's rows with each other, or, with all=True, with everybody's."""

    def __init__(self, m, everybody=False):
        super().__init__()
        self.m, self.everybody = m, everybody

    def loss(self, batch):
        z = self.net(batch[0])
        z = z[None] if self.everybody else z.unflatten(0, (-1, self.m))
        return torch.cdist(z, z).square().flatten(1).mean(1).mean()


class Transformer(nn.Module):
    """A class token, positions, tied weights; rows in front or time in front."""

    def __init__(self, batch_first):
        super().__init__()
        self.embed, self.out, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False), nn.Linear(7, 2)
        self.out.weight = self.embed.weight
        self.position, self.token = nn.Parameter(torch.randn(1, 6, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        z = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        z = self.layer(z if self.batch_first else z.transpose(0, 1))
        return self.head(self.out(z)).mean(1 if self.batch_first else 0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1))


def linear():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2))


def convolutions():
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
    return nn.Sequential(first, nn.GroupNorm(2, 4), nn.ReLU(), second, nn.Flatten(), nn.Linear(16, 2))


NETS = {
    "linear": (linear, (3,), None),
    "convolutions": (convolutions, (2, 6, 6), None),
    "transformer": (lambda: Transformer(True), (5,), 7),
    "time first": (lambda: Transformer(False), (5,), 7),
    "lstm": (Recurrent, (4, 3), None),
}


def by_hand(module, data, groups, max_grad_norm=1.0):
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for group in groups:
        batch = [torch.stack([data[i][k] for i in group]) for k in range(len(data[0]))]
        gradients = torch.autograd.grad(module.loss(batch), list(parameters.values()), allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, total.values(), strict=True)]
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        for name, g in zip(total, gradients, strict=True):
            total[name] += min(1.0, max_grad_norm / max(norm, 1e-300)) * g
    return {name: t / len(groups) for name, t in total.items()}


def groups_of(seen, m, num_batches, ids=IDS):
    """The rows of every user in the physical batches of the last step."""
    groups = torch.tensor([i for rows in seen[len(seen) - num_batches :] for i in rows]).reshape(-1, m).tolist()
    assert sorted({ids[i] for i in group}.pop() for group in groups) == sorted(set(ids))
    assert all(len({ids[i] for i in group}) == 1 for group in groups)
    return groups


def assert_right(module, m, physical=None, data=None, max_grad_norm=1.0, **settings):
    """Train one step on everybody, and compare with the oracle."""
    data = data or rows_of((3,))
    before = copy.deepcopy(module)
    dp = ldp.DPStrategy(
        noise_multiplier=0,
        max_physical_batch_size=physical,
        max_grad_norm=max_grad_norm,
        target_delta=1e-3,
        **settings,
    )
    trainer(dp, max_steps=1).fit(module, users(m, data=data))
    most = 1 if settings.get("clipping_engine") == "loop" else (physical or USERS * m) // m
    groups = groups_of(module.seen, m, -(-USERS // most))
    expected = by_hand(before, data, groups, max_grad_norm)
    for name, p in module.named_parameters():
        error = float((p.grad - expected[name]).norm())
        assert error <= 1e-10 * max(1e-3, float(expected[name].norm())), f"{name} is off by {error}"
    return dp


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("net", [n if n == "linear" else pytest.param(n, marks=pytest.mark.slow) for n in NETS])
def test_a_users_gradient_is_clipped_as_one(net, m):
    """Physical batches of two users, and one row to spare."""
    build, shape, vocabulary = NETS[net]
    assert_right(Mean(build().double()), m, 2 * m + m // 2, rows_of(shape, vocabulary=vocabulary))


def test_users_of_a_small_transformer():
    build, shape, vocabulary = NETS["transformer"]
    assert_right(Mean(build().double()), 2, 4, rows_of(shape, vocabulary=vocabulary))


@pytest.mark.parametrize("physical", [3, 5, 6, 1000, None])
def test_physical_batches_hold_whole_users(physical):
    assert_right(Mean(linear().double()), 3, physical)


@pytest.mark.parametrize("max_grad_norm", [1e-2, 100.0])
def test_other_bounds(max_grad_norm):
    assert_right(Mean(linear().double()), 2, 4, max_grad_norm=max_grad_norm)


def test_a_sum_is_a_sum_over_a_users_rows():
    assert_right(Sum(linear().double()), 3, 6, loss_reduction="sum")


@pytest.mark.parametrize("m", [1, 3])
def test_the_loop_clips_users_too(m):
    assert_right(Mean(linear().double()), m, clipping_engine="loop")


@pytest.mark.parametrize("module", [Pooled, Contrast])
def test_a_users_rows_may_influence_each_other(module):
    assert_right(module(2), 2, 6)


def test_users_must_not_influence_each_other():
    with pytest.raises(ldp.UnsupportedModelError, match=r"self-check \(c\)"):
        trainer(max_steps=1).fit(Contrast(2, everybody=True), users(2))


class Manual(Mean):
    """Two optimizers on two halves of the parameters, stepped by hand."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[-1].tolist())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[k].parameters(), lr=0.5) for k in (0, 2)]


def test_manual_optimization():
    """Every optimizer's step is clipped on its own parameters, and the second sees what the first changed."""
    module, data = Manual(), rows_of((3,))
    expected = copy.deepcopy(module)
    trainer(ldp.DPStrategy(noise_multiplier=0, target_delta=1e-3), max_steps=2).fit(module, users(2))
    groups = groups_of(module.seen, 2, 1)
    for half in (expected.net[0], expected.net[2]):
        expected.requires_grad_(False)
        half.requires_grad_(True)
        part = Mean(expected.net)
        part.named_parameters = half.named_parameters
        for p, g in zip(half.parameters(), by_hand(part, data, groups).values(), strict=True):
            p.data -= 0.5 * g
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        assert float((p - q).detach().norm()) <= 1e-10 * float(q.detach().norm())


def test_manual_optimization_in_whole_logical_batches():
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, max_physical_batch_size=9)
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"max_physical_batch_size=9 with .* up to 10 samples"):
        trainer(dp).fit(Manual(), users(2))


class Sizes(pl.Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        chunk = trainer.train_dataloader._delivered
        self.batches.append((len(batch[0]), chunk.num_rows, chunk.num_real))


def test_several_optimizers_see_batches_of_one_size():
    sizes = Sizes()
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer(dp, max_steps=20, callbacks=[sizes]).fit(Manual(), users(2, batch_size=4))
    assert {size[:2] for size in sizes.batches} == {(10, 5)}
    assert len({real for *_, real in sizes.batches}) > 1


# ---- what is accounted -----------------------------------------------------------------------------------------------

MANY = [user for user in range(40) for _ in range(1 + user % 3)]
"""Forty users, 79 examples."""


def test_rate_delta_and_division_are_those_of_users():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    sizes = Sizes()
    trainer(dp, max_steps=30, callbacks=[sizes]).fit(Mean(), users(2, MANY, batch_size=20))
    assert dp.sample_rate == 20 / (2 * 40)
    assert dp.delta == 1 / 400
    assert dp.unit == "user"
    assert dp._run.mechanism.expected_batch_size == 10
    pld = oracles.pld_epsilon([(0.25, 1.0, 30)], 1 / 400)
    assert pld <= dp.epsilon <= 1.02 * pld
    ((release, count),) = dp._run.ledger.counts.items()
    assert (release.unit, release.num_units, release.partition, count) == ("user", 40, None, 30)


def test_noise_is_that_of_one_users_bound():
    """A gradient of noise alone: its deviation is the noise multiplier times the bound, over the expected users."""
    data = users(2, MANY, data=TensorDataset(torch.randn(79, 3), torch.randn(79, 2)), batch_size=20)
    module = ZeroGradient(nn.Linear(3, 5000))
    dp = ldp.DPStrategy(noise_multiplier=2.0, max_grad_norm=0.5)
    trainer(dp, max_steps=1).fit(module, data)
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert float(gradient.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.03)


def test_one_user_more_moves_the_sum_by_at_most_the_bound():
    """Also if that user has many examples and huge gradients. 8 and 5 divide 40, so no choice is left to chance."""
    data = rows_of((3,))
    data.tensors[1][[i for i in range(len(IDS)) if IDS[i] == 3]] = 1e6
    ids = [user if user == 3 else 1 for user in IDS]
    owned = {user: [i for i in range(len(ids)) if ids[i] == user] for user in (1, 3)}
    total = {}
    for held in ([1], [1, 3]):
        at = sorted(i for user in held for i in owned[user])
        private = ldp.PrivateDataset(Subset(data, at), user_ids=[ids[i] for i in at], examples_per_user=40)
        torch.manual_seed(0)
        module = Mean(linear().double())
        dp = ldp.DPStrategy(noise_multiplier=0, target_delta=1e-3)
        trainer(dp, max_steps=1).fit(module, DataLoader(private, batch_size=40 * len(held)))
        total[len(held)] = torch.cat([p.grad.flatten() for p in module.parameters()]) * len(held)
    assert float((total[2] - total[1]).norm()) == pytest.approx(1.0, abs=1e-12)


def test_the_rate_cannot_be_above_one():
    with pytest.raises(
        ldp.PrivacyConfigurationError, match=r"N=5 training users: .* be 1.2.* batch_size of at most 10"
    ):
        trainer().fit(Mean(), users(2, batch_size=12))


def test_delta_must_be_below_one_over_the_users():
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"N=5 training users.* publishes one random user"):
        trainer(ldp.DPStrategy(noise_multiplier=1.0, target_delta=0.2)).fit(Mean(), users())


@pytest.mark.parametrize("engine", ["book", "loop"])
def test_a_physical_batch_holds_at_least_one_user(engine):
    dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2, clipping_engine=engine)
    with pytest.raises(
        ldp.PrivacyConfigurationError, match=r"=2 with examples_per_user=3: .* Use at least 3, or fewer"
    ):
        trainer(dp).fit(Mean(), users(3))


def test_a_small_batch_size_still_makes_physical_batches_of_a_user():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(dp).fit(Mean(), users(3, batch_size=2))
    assert dp._run.loader.max_physical_batch_size == 1
    assert dp.sample_rate == 2 / 15


def test_a_schedule_changes_how_many_users_are_drawn():
    dp = ldp.DPStrategy(noise_multiplier=1.0, schedule=[ldp.Stage(2), ldp.Stage(1, batch_size_factor=2.0)])
    trainer(dp, max_steps=5).fit(Mean(), users(2, MANY, batch_size=20))
    assert [(r.sample_rate, n) for r, n in dp._run.ledger.counts.items()] == [(0.25, 2), (0.5, 3)]


@pytest.mark.parametrize(("now", "before"), [("user", "example"), ("example", "user")])
@pytest.mark.parametrize("partition", [None, "b"])
def test_users_and_examples_are_never_accounted_together(now, before, partition):
    """Neither by saying that a change is meant, nor by naming another partition."""
    data = {"user": users(partition=partition), "example": users(ids=list(range(13)), partition=partition)}
    data["example"].dataset.user_ids = None
    dp = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    fit = trainer(dp, max_steps=2)
    fit.fit(Mean(), data[before])
    fit.fit_loop.epoch_loop.max_steps = 4
    with pytest.raises(ldp.PrivacyConfigurationError, match=rf"per {now} and was per {before} in the 2 releases"):
        fit.fit(Mean(), data[now])
    assert dp.num_releases == 2


def test_users_and_examples_are_never_accounted_together_across_checkpoints(tmp_path):
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=2)
    fit.fit(Mean(), users())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    dp = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    with pytest.raises(ldp.PrivacyConfigurationError, match="privacy is now per example and was per user"):
        trainer(dp, max_steps=4).fit(Mean(), DataLoader(rows_of((3,)), batch_size=3), ckpt_path=tmp_path / "a.ckpt")


# ---- how it comes to the trainer -------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        whole = ldp.PrivateDataset(rows_of((3,)), user_ids=IDS, examples_per_user=2)
        train, self.held_out = torch.utils.data.random_split(whole, [9, 4], generator=torch.Generator().manual_seed(0))
        self.num_users = len({IDS[i] for i in train.indices})
        return DataLoader(train, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows_of((3,)), batch_size=4)


class Validated(Mean):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


def test_a_datamodule_with_a_split():
    dp, data = ldp.DPStrategy(noise_multiplier=1.0), Data()
    trainer(dp).fit(Validated(), datamodule=data)
    assert dp.unit == "user"
    assert dp._run.loader.units.num_units == data.num_users
    assert dp.sample_rate == pytest.approx(4 / (2 * data.num_users))


def test_a_dataset_that_joins_others_is_refused():
    whole = ldp.PrivateDataset(rows_of((3,)), user_ids=IDS)
    with pytest.raises(ldp.PrivacyConfigurationError, match="a ConcatDataset with a PrivateDataset inside"):
        trainer().fit(Mean(), DataLoader(ConcatDataset([whole, rows_of((3,))]), batch_size=3))


class Counted(Dataset):
    """Counts in this process which examples are read."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read.append(index)
        return self.data[index]


def test_nobody_is_trained_on_who_was_not_drawn():
    """Every row of a step belongs to a drawn user; an empty draw has one phantom, which adds nothing."""
    data = Counted(rows_of((3,), MANY))
    steps = []

    class Watched(Mean):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen.clear()

        def on_before_optimizer_step(self, optimizer):
            rows = [i for rows in self.seen for i in rows]
            steps.append(({MANY[i] for i in rows}, float(self.net.weight.grad.norm())))

    dp = ldp.DPStrategy(noise_multiplier=0, self_check=False, max_physical_batch_size=4)
    fit = trainer(dp, max_steps=1)
    fit.fit(Watched(), users(2, MANY, batch_size=2, data=data))  # also the look at the model before the first step
    steps.clear()
    draws = []
    loader = dp._run.loader
    draw = type(loader).draw
    try:
        type(loader).draw = lambda self, *args: draws.append(draw(self, *args)) or draws[-1]
        fit.fit_loop.epoch_loop.max_steps = 31
        fit.fit(Watched(), users(2, MANY, batch_size=2, data=data))
    finally:
        type(loader).draw = draw
    assert len(steps) == 30
    assert any(not drawn for drawn in draws)
    for (owners, size), drawn in zip(steps[1:], draws[1 : len(steps)], strict=True):  # the first one looks again
        assert owners == (set(drawn) or {0})
        assert (size > 0) == bool(drawn)


@pytest.mark.slow
def test_workers():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    module = Mean()
    trainer(dp, max_steps=8).fit(module, users(2, MANY, batch_size=20, num_workers=2, persistent_workers=True))
    for rows in module.seen:
        pairs = torch.tensor([MANY[i] for i in rows]).reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all()


def test_summary_says_what_it_holds_for(capsys):
    for data, words in ((users(2), "one user with all their examples"), (users(2).dataset.dataset, "training example")):
        dp = ldp.DPStrategy(noise_multiplier=1.0)
        trainer(dp).fit(Mean(), data if isinstance(data, DataLoader) else DataLoader(data, batch_size=4))
        print_summary(dp)
        assert f"adding or removing one {words.removeprefix('one ')}" in " ".join(capsys.readouterr().out.split())


def test_plan_counts_users(capsys):
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    found = ldp.plan(trainer(dp), Mean(), users(2, MANY, batch_size=20))
    assert (found.num_users, found.num_examples, found.expected_batch_size) == (40, 79, 20)
    assert (found.physical_batch_size, found.sample_rate, found.delta) == (20, 0.25, 1 / 400)
    assert not found.is_refused
    shown = " ".join(capsys.readouterr().out.split())
    assert "training users (N) │ 40, with 79 examples" in shown
    assert "expected batch │ 20 examples, 2 of each user" in shown


def test_regression_on_examples_is_unchanged():
    """A PrivateDataset that says nothing trains exactly as the dataset inside."""
    released = []
    for wrap in (ldp.PrivateDataset, lambda data: data):
        torch.manual_seed(0)
        module = Regression()
        data = TensorDataset(*(t.float() for t in rows_of((3,)).tensors[:2]))
        dp = ldp.DPStrategy(noise_multiplier=0)
        trainer(dp, max_steps=1).fit(module, DataLoader(wrap(data), batch_size=13))
        released.append((torch.cat([p.grad.flatten() for p in module.parameters()]), dp.unit, dp.delta))
    torch.testing.assert_close(released[0][0], released[1][0], rtol=0, atol=0)
    assert released[0][1:] == released[1][1:] == ("example", 1 / 130)


class Drops:
    """Leaves out examples whose number is marked, as collate functions do with broken files."""

    def __init__(self, dropped):
        self.dropped = dropped

    def __call__(self, examples):
        kept = [e for e in examples if int(e[-1]) not in self.dropped]
        return [torch.stack([e[k] for e in kept]) for k in range(3)]


@pytest.mark.parametrize("in_training_step", [False, True])
def test_a_row_that_is_left_out_is_noticed(in_training_step):
    """One row of each user is missing after the model was observed: what is left divides evenly, and wrongly."""
    ids = [user for user in range(40) for _ in range(2)]
    numbers = set()
    collate = Drops(numbers)

    class Late(Mean):
        def on_before_optimizer_step(self, optimizer):
            numbers.update(range(0, 80, 2))

        def training_step(self, batch, batch_idx):
            if in_training_step:
                batch = collate(list(zip(*batch, strict=True)))
            return super().training_step(batch, batch_idx)

    module = Late()
    data = users(2, ids, data=rows_of((3,), ids), collate_fn=None if in_training_step else collate)
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.UnsupportedModelError, match=r"held 2 row\(s\) of each sample"):
        trainer(dp, max_steps=2).fit(module, data)
    assert dp.num_releases == 1


class Packed(Mean):
    """One sequence for each row, packed."""

    def __init__(self):
        super().__init__(Recurrent().double())

    def loss(self, batch):
        lengths = torch.full((len(batch[0]),), 4)
        packed = nn.utils.rnn.pack_padded_sequence(batch[0], lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.net.lstm(packed)[0], batch_first=True)
        return F.mse_loss(self.net.head(out.mean(1)), batch[1])


def test_packed_sequences():
    data = rows_of((4, 3))
    with pytest.raises(ldp.UnsupportedModelError, match="the packed sequence holds 4 sequences for 2 samples"):
        trainer(max_steps=1).fit(Packed(), users(2, data=data))
    assert_right(Packed(), 1, data=data)
    assert_right(Packed(), 2, data=data, clipping_engine="loop")


def test_a_parameter_for_every_row():
    class Token(Mean):
        def __init__(self, join):
            super().__init__()
            self.token, self.join = nn.Parameter(torch.ones(1, 3).double()), join

        def loss(self, batch):
            token = self.join(self.token, len(batch[0]))
            return F.mse_loss(self.net(batch[0] * token), batch[1])

    assert_right(Token(lambda t, n: t.expand(n, -1)), 2)
    assert_right(Token(lambda t, n: torch.cat([t] * n)), 1)
    with pytest.raises(ldp.UnsupportedModelError, match="do not scale with the number of samples"):
        trainer(max_steps=1).fit(Token(lambda t, n: torch.cat([t] * n)), users(2))


def test_dropout_draws_for_every_row():
    """The self-check compares users under equal draws for all rows."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=2).fit(Mean(net), users(3))
