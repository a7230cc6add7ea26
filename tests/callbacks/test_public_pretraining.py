"""Public steps against loops by hand: what they move, what they spend, and what they never touch."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lightning_dp as ldp
from lightning_dp.strategies.mixing import Mixing, MixingSettings, Plateau
from tests.accounting import oracles
from tests.models import Regression, clipped_mean, loader, parameters, trainer
from tests.strategies.reference import assert_equal, network

N, STEPS = 12, 6


def examples(n=N, seed=1):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(*(torch.randn(n, k, generator=g, dtype=torch.float64) for k in (3, 2)))


def public(n=8, batch_size=4, shuffle=False, **settings):
    return DataLoader(examples(n), batch_size=batch_size, shuffle=shuffle, **settings)


def private():
    """Every example in every batch: at noise 0 nothing is left to chance."""
    return loader(n=N, batch_size=N, dtype=torch.float64)


class Counted(Dataset):
    """Counts how often an example is read, and at which step."""

    def __init__(self, data):
        self.data, self.reads, self.step = data, [], lambda: 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads.append(self.step())
        return self.data[index]


def module(optimizer=torch.optim.SGD, lr=0.1):
    return Regression(network(), lr=lr, optimizer=optimizer)


def fit(model, callback, data=None, steps=STEPS, strategy=None, ckpt_path=None, callbacks=(), **settings):
    dp = strategy or ldp.DPStrategy(noise_multiplier=0, max_physical_batch_size=5)
    made = trainer(dp, max_steps=steps, callbacks=[callback, *callbacks], **settings)
    made.fit(model, data or private(), ckpt_path=ckpt_path)
    return made


def by_hand(model, weights, data=None, given=None, reset_at=None):
    """Return the parameters after a loop with these weights of the public gradient."""
    model = copy.deepcopy(model)
    (x, y), pub = (data or private()).dataset.tensors, given or public()
    batches, optimizer = [b for _ in range(20) for b in pub], model.configure_optimizers()
    taken = 0
    for step, weight in enumerate(weights):
        gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        if weight > 0:
            loss = model.training_step(batches[taken], 0)
            taken += 1
            for (_, g), h in zip(gradient.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                g += weight * h
        if weight < 1:
            for name, g in clipped_mean(model, lambda i: (x[i : i + 1], y[i : i + 1]), len(x)).items():
                gradient[name] += (1 - weight) * g
        if step == reset_at:
            for state in optimizer.state.values():
                state.get("exp_avg", torch.zeros(())).zero_()
        for name, p in model.named_parameters():
            p.grad = gradient[name]
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fraction", [1 / 6, 0.5])
def test_public_then_private_steps_are_those_of_a_loop(optimizer, fraction):
    model, switch = module(optimizer), round(fraction * STEPS)
    weights = [1.0] * switch + [0.0] * (STEPS - switch)
    expected = by_hand(model, weights, reset_at=switch)
    made = fit(model, ldp.PublicPretraining(public(), switch=fraction))
    assert_equal(model, expected)
    assert (made.global_step, made.strategy.num_releases) == (STEPS, STEPS - switch)


def test_cosine_mixes_both_gradients():
    model, end = module(torch.optim.AdamW), 4
    weights = [(1 + math.cos(math.pi * t / end)) / 2 if t < end else 0.0 for t in range(STEPS)]
    expected = by_hand(model, weights)
    made = fit(model, ldp.PublicPretraining(public(), switch=end / STEPS, mix="cosine"))
    assert_equal(model, expected)
    assert made.strategy.num_releases == STEPS - 1  # the first one has weight 1


@pytest.mark.parametrize(("mix", "switch"), [("cosine", 1.0), ("sample", 0.5), ("switch", 0.5)])
def test_optimizers_are_told_the_noise_that_is_left_in_a_mixed_gradient(mix, switch):
    told, seen = [], []

    class Told(torch.optim.SGD):
        def receive_noise(self, noise_std):
            told.append(noise_std)

    class Seen(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(told[-1])

    strategy = ldp.DPStrategy(noise_multiplier=3.0, max_grad_norm=0.5, target_delta=1e-3)
    fit(module(Told), ldp.PublicPretraining(public(), switch=switch, mix=mix), strategy=strategy, callbacks=[Seen()])
    cosine = [(1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]
    weights = {"cosine": cosine, "sample": [4 / (4 + N)] * 3 + [0.0] * 3, "switch": [1.0] * 3 + [0.0] * 3}[mix]
    assert seen == pytest.approx([(1 - weight) * 3.0 * 0.5 / N for weight in weights])


def test_sample_weighs_every_example_the_same():
    """The mean over all 4 + 12 examples, before clipping; it is large enough here that nothing is clipped."""
    model = module()
    expected = by_hand(model, [4 / (4 + N)] * 3 + [0.0] * 3)
    fit(model, ldp.PublicPretraining(public(), switch=0.5, mix="sample"))
    assert_equal(model, expected)
    model, strategy = module(), ldp.DPStrategy(noise_multiplier=0, max_grad_norm=1e6)
    after = copy.deepcopy(model)
    pooled = [torch.cat(both) for both in zip(private().dataset.tensors, next(iter(public())), strict=True)]
    after.training_step(pooled, 0).backward()
    after.configure_optimizers().step()
    fit(model, ldp.PublicPretraining(public(), switch=1.0, mix="sample"), steps=1, strategy=strategy)
    assert_equal(model, parameters(after))


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (torch.optim.NAdam, "exp_avg_sq"),
        *(pytest.param(kind, "exp_avg_sq", marks=pytest.mark.slow) for kind in (torch.optim.Adam, torch.optim.RAdam)),
        (torch.optim.Adamax, "exp_inf"),
    ],
)
def test_the_switch_resets_the_first_moment_alone(optimizer, kept):
    seen = []

    class Watches(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step in (2, 3):
                seen.append({k: v.clone() for k, v in optimizer.state[pl_module.net[0].weight].items()})

    fit(module(optimizer), ldp.PublicPretraining(public(), switch=0.5), callbacks=[Watches()])
    before, after = seen
    assert bool((before["exp_avg"] != 0).any())
    assert bool((after["exp_avg"] == 0).all())
    assert bool((after[kept] != 0).any())
    assert float(after["step"]) == 3


def test_momentum_of_sgd_and_the_learning_rate_stay():
    class Momentum(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
            ]

    rates, buffers = [], []

    class Watches(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            buffers.append([float(s["momentum_buffer"].norm()) for s in optimizer.state.values()])

    fit(Momentum(network()), ldp.PublicPretraining(public(), switch=0.5), callbacks=[Watches()])
    assert rates == pytest.approx([0.1 * 0.5**t for t in range(STEPS)])
    assert min(buffers[3]) > 0


# ---- what is spent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_private_data_is_not_read_before_the_switch(workers, caplog):
    data = Counted(private().dataset)
    seen = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            data.step = lambda: trainer.global_step
            seen.append((len(data.reads), trainer.strategy.num_releases, trainer.strategy.epsilon))

    given = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
    strategy = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    with caplog.at_level("INFO"):
        fit(module(), ldp.PublicPretraining(public(), switch=0.5), given, strategy=strategy, callbacks=[Counts()])
    assert seen[:3] == [(0, 0, 0.0)] * 3
    assert [releases for _, releases, _ in seen] == [0, 0, 0, 1, 2, 3]
    assert data.reads  # the look at the first private step, in this process
    noise = strategy.noise_multiplier
    expected = ldp.calibrate_noise_multiplier(target_epsilon=2.0, target_delta=1e-3, sample_rate=0.25, num_steps=3)
    assert noise == expected
    assert strategy.epsilon == ldp.compute_epsilon(noise_multiplier=noise, sample_rate=0.25, num_steps=3, delta=1e-3)
    assert "for 3 steps at sample rate 0.25" in caplog.text
    assert "the public phase ends after 3 steps, and private steps begin" in caplog.text


def test_a_plateau_calibrates_for_the_steps_that_are_left(caplog):
    """Learning rate 0: no check after the first improves, so after 1 + 2 checks of 2 steps each comes the switch."""
    strategy = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    with caplog.at_level("INFO"):
        made = fit(
            module(lr=0.0),
            ldp.PublicPretraining(public(), patience=2),
            loader(n=N, batch_size=3, dtype=torch.float64),
            steps=20,
            strategy=strategy,
        )
    assert (made.global_step, strategy.num_releases) == (20, 14)
    expected = ldp.calibrate_noise_multiplier(target_epsilon=2.0, target_delta=1e-3, sample_rate=0.25, num_steps=14)
    assert strategy.noise_multiplier == expected
    assert 1.98 < strategy.epsilon <= 2.0
    assert "after 6 steps, as the public loss has not improved in 2 checks" in caplog.text
    assert caplog.text.count("calibrated to epsilon") == 1
    assert "for 14 steps" in caplog.text


def test_mixed_steps_spend_as_private_ones():
    strategy = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    data = loader(n=N, batch_size=3, dtype=torch.float64)
    fit(module(), ldp.PublicPretraining(public(), switch=1.0, mix="cosine"), data, strategy=strategy)
    assert strategy.num_releases == STEPS - 1
    assert strategy.noise_multiplier == ldp.calibrate_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-3, sample_rate=0.25, num_steps=STEPS - 1
    )


def test_the_public_loss_decides_held_out_or_not():
    """A falling training loss with a held-out loss that never falls: the first is judged only without the second."""

    class Falls(Regression):
        def training_step(self, batch, batch_idx):
            x, _ = batch
            falling = self.net.bias.sum() if self.training else 1.0 + 0 * self.net.bias.sum()
            return falling + 0 * self.net(x).sum()

    def switch_of(**settings):
        made = fit(
            Falls(nn.Linear(3, 2).double(), lr=0.1),
            callback := ldp.PublicPretraining(public(), patience=1, **settings),
            steps=10,
            strategy=ldp.DPStrategy(noise_multiplier=1.0, self_check=False),
        )
        assert made.global_step == 10
        return callback._steps.mixing.private_from

    assert switch_of() is None
    assert switch_of(public_val_dataloader=public()) == 4
    assert switch_of(public_val_dataloader=public(), check_every=1) == 2


def test_a_fit_that_stays_public_says_so(caplog):
    strategy = ldp.DPStrategy(target_epsilon=2.0)
    fit(module(), ldp.PublicPretraining(public(), patience=50), steps=4, strategy=strategy)
    assert "the private data was not used" in caplog.text
    assert (strategy.num_releases, strategy.epsilon) == (0, 0.0)


# ---- resume ----------------------------------------------------------------------------------------------------------


HALF, PLATEAU, COSINE = {"switch": 0.5}, {"patience": 1, "min_delta": 5.0}, {"switch": 1.0, "mix": "cosine"}


@pytest.mark.parametrize(
    ("settings", "at", "shuffle"),
    [
        (HALF, 3, True),
        (HALF, 6, False),
        (PLATEAU, 5, True),
        (COSINE, 5, True),
        *(pytest.param(HALF, at, at == 1, marks=pytest.mark.slow) for at in (1, 4)),
        *(pytest.param(PLATEAU, at, at > 5, marks=pytest.mark.slow) for at in (2, 3, 6, 7)),
        pytest.param(COSINE, 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(settings, at, shuffle, tmp_path):
    """At noise 0, with two steps to an epoch and 3 batches to a pass of the public data."""

    def run(steps, ckpt_path=None, callbacks=()):
        torch.manual_seed(0)
        model = Regression(network(), lr=0.05, optimizer=torch.optim.AdamW)
        torch.manual_seed(0 if ckpt_path is None else 5)
        data = loader(n=N, batch_size=N, dtype=torch.float64)
        callback = ldp.PublicPretraining(public(n=12, shuffle=shuffle), **settings)
        fit(model, callback, data, steps, ckpt_path=ckpt_path, callbacks=callbacks)
        return model, callback

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    whole, first = run(8, callbacks=[saves])
    path = next(tmp_path.glob(f"*step={at}.ckpt"))
    segments = torch.load(path)["lightning_dp"]["ledger"]["segments"].values()
    for journal in tmp_path.glob("privacy-journal-*.json"):
        journal.unlink()
    again, second = run(8, ckpt_path=path)
    assert_equal(again, parameters(whole))
    assert first._steps.mixing.private_from == second._steps.mixing.private_from is not None
    released = sum(row["num_releases"] for rows in segments for row in rows)
    assert released == max(0, at - first._steps.mixing.private_from)


@pytest.mark.slow
def test_resume_keeps_noise_and_budget(tmp_path):
    data = loader(n=N, batch_size=3, dtype=torch.float64)
    first = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(module(), ldp.PublicPretraining(public(), patience=1, min_delta=99.0), data, 9, first, callbacks=[saves])
    for journal in tmp_path.glob("privacy-journal-*.json"):
        journal.unlink()
    assert first.num_releases == 5
    for at in (2, 4, 5, 8):
        path = next(tmp_path.glob(f"*step={at}.ckpt"))
        dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
        fit(module(), ldp.PublicPretraining(public(), patience=1, min_delta=99.0), data, 9, dp, ckpt_path=path)
        assert (dp.num_releases, dp.noise_multiplier, dp.epsilon) == (5, first.noise_multiplier, first.epsilon), at
        for journal in tmp_path.glob("privacy-journal-*.json"):
            journal.unlink()


@pytest.mark.slow
def test_an_older_checkpoint_of_the_public_phase_forgets_no_release(tmp_path):
    """The run ends after four private steps; who begins again before them has spent their epsilon already."""

    class Ends(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.strategy.num_releases == 4

    def settings():
        return {
            "data": loader(n=N, batch_size=3, dtype=torch.float64),
            "steps": 12,
            "strategy": ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3),
        }

    def callback():
        return ldp.PublicPretraining(public(), patience=1, min_delta=99.0)

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    first = fit(module(), callback(), callbacks=[saves, Ends()], **settings())
    assert (first.strategy.num_releases, first.global_step) == (4, 8)
    again = fit(
        module(),
        callback(),
        ckpt_path=next(tmp_path.glob("*step=2.ckpt")),
        callbacks=[ldp.PrivacyBudgetStopping()],
        **settings(),
    )
    kinds = [(p.sample_rate, p.noise_multiplier, p.num_releases) for p in again.strategy._run.ledger.phases]
    assert sum(count for *_, count in kinds) > 4
    assert oracles.pld_epsilon(kinds, 1e-3) <= again.strategy.epsilon <= 2.0


# ---- what users give -------------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    """Private and public data, as a user would bring them."""

    def train_dataloader(self):
        return private()

    def public_dataloader(self):
        return public()


class Brings(Regression):
    """A module that brings public data itself."""

    def public_dataloader(self):
        return public()


@pytest.mark.parametrize("way", ["argument", "function", "module", "datamodule"])
def test_where_public_data_comes_from(way):
    model = Brings(network(), lr=0.1) if way == "module" else module()
    given = {"argument": public(), "function": public}.get(way)
    expected = by_hand(model, [1.0] * 3 + [0.0] * 3)
    fit(model, ldp.PublicPretraining(given, switch=0.5), Data() if way == "datamodule" else None)
    assert_equal(model, expected)


def test_a_stream_of_public_data():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(examples())

    model = module()
    expected = by_hand(model, [1.0] * 3 + [0.0] * 3, given=public(n=N, batch_size=3))
    fit(model, ldp.PublicPretraining(DataLoader(Stream(), batch_size=3), switch=0.5))
    assert_equal(model, expected)


def test_a_public_batch_without_a_loss_moves_nothing():
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step < 3 and self.skips else super().training_step(batch, batch_idx)

    model = Skips(network(), lr=0.1)
    model.skips = False  # for the look before the first step
    expected = by_hand(module(), [0.0] * 3)

    class Begins(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.skips = True

    with pytest.warns(UserWarning, match="training_step. returned .None."):
        fit(model, ldp.PublicPretraining(public(), switch=0.5), callbacks=[Begins()])
    assert_equal(model, expected)


def test_parameters_without_an_optimizer_are_constants_after_public_steps_too():
    class Extra(Regression):
        def __init__(self):
            super().__init__(network(), lr=0.1)
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self.scale * self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    for settings in ({"switch": 0.5}, {"switch": 0.5, "mix": "cosine"}):
        model, plain = Extra(), module()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "scale"})
        fit(model, ldp.PublicPretraining(public(), **settings))
        fit(plain, ldp.PublicPretraining(public(), **settings))
        del model.scale
        assert_equal(model, parameters(plain))


def test_the_weight_is_logged_and_the_module_is_left_alone():
    seen = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(trainer.progress_bar_metrics.get("privacy/public_weight", -1)))

    model = module()
    fit(model, ldp.PublicPretraining(public(), switch=0.5), callbacks=[Watches()])
    assert (seen[1], seen[-1]) == (1.0, 0.0)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_second_fit_goes_on_privately():
    model, callback = module(), ldp.PublicPretraining(public(), switch=0.5)
    made = fit(model, callback)
    made.fit_loop.epoch_loop.max_steps = 8
    made.fit(model, private())
    assert (made.global_step, made.strategy.num_releases) == (8, 5)


def test_a_plan_counts_private_steps_alone():
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    data = loader(n=N, batch_size=3, dtype=torch.float64)
    planned = trainer(dp, max_steps=10, callbacks=[ldp.PublicPretraining(public(), switch=0.4)])
    plan = ldp.plan(planned, module(), data, show=False)
    assert not plan.is_refused
    assert (plan.planned_steps, plan.steps) == (10, 6)
    assert plan.public_steps == "The first 4 steps are public; they spend nothing."
    assert plan.epsilon == ldp.compute_epsilon(
        noise_multiplier=plan.noise_multiplier, sample_rate=0.25, num_steps=6, delta=1e-3
    )


def test_a_schedule_counts_the_steps_of_the_run():
    """Three public steps, then the stages go on from step 3."""
    stages = (ldp.Stage(5, noise_factor=2.0), ldp.Stage(4, batch_size_factor=0.5))
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, schedule=stages)
    fit(module(), ldp.PublicPretraining(public(), switch=0.25), loader(dtype=torch.float64), 12, dp)
    found = [(p.sample_rate, p.num_releases, p.noise_multiplier) for p in dp._run.ledger.phases]
    assert found == [(0.25, 2, 2.0), (0.125, 7, 1.0)]
    pld = oracles.pld_epsilon([(q, z, n) for q, n, z in found], 1e-3)
    assert pld <= dp.epsilon <= 1.02 * pld


def test_the_report_says_that_public_data_is_not_protected(tmp_path):
    report = ldp.PrivacyReport()
    made = fit(
        module(),
        ldp.PublicPretraining(public(), switch=0.5),
        strategy=ldp.DPStrategy(noise_multiplier=1.0),
        callbacks=[report],
    )
    limits = {limit.subject: limit.text for limit in report.report(made).not_covered}
    assert "declared public, too (PublicPretraining, mix='switch')" in limits["public data"]
    made.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=7)
    again.fit(module(), private(), ckpt_path=tmp_path / "a.ckpt")
    assert again.strategy.record().public_mix == "switch"
    plain = trainer(max_steps=1)
    plain.fit(module(), private())
    assert plain.strategy.record().public_mix == ""


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(match, callback, model=None, data=None, error=ldp.PrivacyConfigurationError, **settings):
    with pytest.raises(error, match=match):
        fit(model or module(), callback, data, **settings)


def test_public_data_that_is_private_is_refused():
    data = private()
    refused("has examples of the private training data", ldp.PublicPretraining(data, switch=0.5), data=data)
    base = examples()
    both = [DataLoader(Subset(base, part), batch_size=2) for part in (range(5), range(4, N))]
    message = r"has examples of the private training data \(TensorDataset, 1 of them\)"
    refused(message, ldp.PublicPretraining(both[0], switch=0.5), data=both[1])
    held = ldp.PublicPretraining(public(), public_val_dataloader=both[0])
    refused(message, held, data=both[1])
    marked = DataLoader(ldp.PrivateDataset(base), batch_size=2)
    refused("is or holds a PrivateDataset", ldp.PublicPretraining(marked, switch=0.5))
    nested = Subset(Subset(base, range(6)), [0, 1, 2]), Subset(base, [3, 4, 5, 6])
    made = fit(
        module(), ldp.PublicPretraining(DataLoader(nested[0], batch_size=3), switch=0.5), DataLoader(nested[1], 4)
    )
    assert made.strategy.num_releases == 3


def test_fits_that_cannot_have_public_steps():
    class Manual(Regression):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

    callback = ldp.PublicPretraining(public(), switch=0.5)
    strategy = ldp.DPStrategy(noise_multiplier=1.0)
    refused("automatic_optimization=False: which of its optimizers", callback, Manual(network()), strategy=strategy)
    strategy = ldp.DPStrategy(noise_multiplier=1.0, loss_reduction="sum")
    refused("loss_reduction='sum': public gradients would be sums", callback, strategy=strategy)
    refused("has no public data: expected PublicPretraining", ldp.PublicPretraining(switch=0.5))
    refused("the public dataloader is a list: expected a torch", ldp.PublicPretraining([1], switch=0.5))
    empty = DataLoader(examples(2), batch_size=4, drop_last=True)
    refused("the public dataloader has no batch", ldp.PublicPretraining(empty, switch=0.5))
    unbatched = DataLoader(examples(), batch_size=None)
    refused("the public dataloader has.*batch_size=None", ldp.PublicPretraining(unbatched, switch=0.5, mix="sample"))
    refused("switch=0.5 is a fraction of the steps, and the trainer has no limit", callback, steps=-1, max_epochs=-1)
    refused("switch=0.9 of 2 steps gives 2 public steps", ldp.PublicPretraining(public(), switch=0.9), steps=2)
    refused("switch=0.1 of 2 steps gives 0 public steps", ldp.PublicPretraining(public(), switch=0.1), steps=2)
    with pytest.raises(ldp.PrivacyConfigurationError, match="expected a private strategy"):
        trainer("auto", callbacks=[callback]).fit(module(), private())


def test_what_private_steps_would_refuse_is_refused_before_public_ones():
    class Coupled(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            z = self.net(x)
            return F.mse_loss(z - z.mean(0), y)

    data = Counted(private().dataset)
    model = Coupled(network())
    before = parameters(model)
    callback = ldp.PublicPretraining(public(), switch=0.5)
    refused("sample", callback, model, DataLoader(data, batch_size=4), error=ldp.UnsupportedModelError)
    assert not data.reads
    assert_equal(model, before, 0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mix": "both"}, "mix='both': expected 'switch', 'cosine' or 'sample'"),
        (
            {"switch": 0},
            "switch=0 with mix='switch': expected 'plateau' or a fraction of the steps above 0 and below 1",
        ),
        ({"switch": 1.0}, "switch=1.0 with mix='switch'"),
        ({"switch": True}, "switch=True with mix='switch'"),
        ({"switch": "later"}, "switch='later' with mix='switch'"),
        ({"switch": 1.5, "mix": "cosine"}, "expected a fraction of the steps above 0 and of at most 1"),
        ({"mix": "sample"}, "switch='plateau' with mix='sample'"),
        ({"patience": 0}, "patience=0: expected an integer of at least 1"),
        ({"switch": 0.5, "public_val_dataloader": public()}, "public_val_dataloader with switch=0.5: held-out data is"),
        ({"check_every": 1.5}, "check_every=1.5: expected an integer of at least 1"),
        ({"min_delta": -1}, "min_delta=-1: expected a number of at least 0"),
    ],
)
def test_bad_arguments(settings, match):
    with pytest.raises(ldp.PrivacyConfigurationError, match=match):
        ldp.PublicPretraining(public(), **settings)


@pytest.mark.parametrize("losses", [[3, 2, 1, 1, 1], [3, 2, 1, math.nan, 2], [1, 0.95, 0.93, 0.91, 0.9]])
def test_plateau(losses):
    plateau, reached = Plateau(patience=2, min_delta=0.1), []
    for loss in losses:
        plateau.note(loss)
        reached.append(plateau.is_reached)
    worse = [not loss < min(losses[:k], default=math.inf) - 0.1 for k, loss in enumerate(losses)]
    assert reached == [k >= 1 and worse[k] and worse[k - 1] for k in range(len(losses))]


def test_weights():
    mixing = Mixing(MixingSettings("cosine", 0.5))
    assert mixing.first_private(0, 8) == 1
    assert [mixing.weight(t) for t in (0, 2, 4, 7)] == pytest.approx([1, 0.5, 0, 0])


class Remembering(Regression):
    """Pulls its outputs to where those of the batch before were, whosever that was."""

    def __init__(self, keeps):
        super().__init__(network())
        self.keeps, self.before, self._hidden = keeps, torch.zeros(2, dtype=torch.float64), torch.zeros(2)

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        loss = F.mse_loss(out, batch[1]) + F.mse_loss(out, self._hidden.to(out) + self.before.expand_as(out))
        if self.keeps:
            setattr(self, self.keeps, out.detach().mean(0))
        return loss


@pytest.mark.parametrize(("keeps", "engine"), [("before", "book"), ("_hidden", "loop")])
@pytest.mark.parametrize("mix", ["cosine", "sample"])
def test_public_gradients_made_of_what_a_private_step_left_are_refused(keeps, engine, mix):
    strategy = ldp.DPStrategy(noise_multiplier=1.0, clipping_engine=engine)
    with pytest.raises(ldp.UnsupportedModelError, match="public batch changed with the private example"):
        fit(Remembering(keeps), ldp.PublicPretraining(public(), switch=1.0, mix=mix), strategy=strategy)


def test_public_batches_that_go_on_are_compared_with_reloaded_private_data():
    class Rotating(Regression):
        def _part(self, shift):
            first = (self.trainer.current_epoch + shift) % 2
            return DataLoader(Subset(every, range(first, N, 2)), batch_size=3)

        def train_dataloader(self):
            return self._part(0)

        def public_dataloader(self):
            return self._part(1)

    every, callback = examples(N), ldp.PublicPretraining(switch=1.0, mix="sample")
    made = trainer(max_steps=STEPS, callbacks=[callback], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(ldp.PrivacyConfigurationError, match="has examples of the private training data"):
        made.fit(Rotating(network()))


@pytest.mark.parametrize("check_every", [1, 4])
def test_after_private_steps_a_plateau_does_not_change_the_noise(tmp_path, check_every):
    """Weights that were released decide when it comes: noise that followed from it would be chosen by results."""
    earlier = trainer(ldp.DPStrategy(noise_multiplier=3.0, target_delta=1e-3), max_steps=3)
    model = module()
    earlier.fit(model, loader(n=N, batch_size=3, dtype=torch.float64))
    earlier.save_checkpoint(tmp_path / "private.ckpt")
    strategy = ldp.DPStrategy(target_epsilon=8.0, target_delta=1e-3, changed_settings="new_phase")
    callback = ldp.PublicPretraining(public(), patience=1, min_delta=100.0, check_every=check_every)
    data = loader(n=N, batch_size=2, dtype=torch.float64)
    fit(model, callback, data, 20, strategy, ckpt_path=tmp_path / "private.ckpt")
    (first, _), (second, private_steps) = strategy.releases().items()
    assert (first.noise_multiplier, private_steps) == (3.0, 20 - 3 - 2 * check_every)
    curve = oracles.pld_epsilon([(0.25, 3.0, 3), (second.sample_rate, second.noise_multiplier, 17)], 1e-3)
    assert curve == pytest.approx(8.0, rel=0.02)  # of all steps that might have been private


def test_a_step_that_keeps_nothing_is_mixed():
    made = fit(Remembering(""), ldp.PublicPretraining(public(), switch=1.0, mix="sample"))
    assert made.strategy.num_releases == STEPS
