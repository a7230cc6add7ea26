"""Manual optimization: several optimizers, some of which never see the training data."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_dp as ldp
from tests.models import Regression, loader, parameters, trainer, updates

N, NOISE_SIZE = 12, 3


class GAN(pl.LightningModule):
    """The usual generative adversarial network, its real samples in the training data."""

    def __init__(self, toggle=True, discriminator_first=False, lr=0.1, norm=nn.Identity):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE_SIZE, 8), norm(), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 1))
        self.toggle, self.discriminator_first, self.lr = toggle, discriminator_first, lr

    def step_of(self, optimizer, loss_of):
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss_of())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def judged(self, x, truth):
        return F.binary_cross_entropy_with_logits(self.discriminator(x), torch.full((len(x), 1), truth).to(x))

    def noise(self, real):
        return torch.randn(len(real), NOISE_SIZE, dtype=real.dtype)

    def discriminator_loss(self, real, z):
        return (self.judged(real, 1.0) + self.judged(self.generator(z).detach(), 0.0)) / 2

    def training_step(self, batch, batch_idx):
        (real,) = batch
        z, (g, d) = self.noise(real), self.optimizers()
        steps = [
            (g, lambda: self.judged(self.generator(z), 1.0)),
            (d, lambda: self.discriminator_loss(real, z)),
        ]
        for optimizer, loss_of in reversed(steps) if self.discriminator_first else steps:
            self.step_of(optimizer, loss_of)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), self.lr) for part in (self.generator, self.discriminator)]


def real_samples(batch_size=N):
    g = torch.Generator().manual_seed(3)
    return DataLoader([(x,) for x in torch.randn(N, 4, generator=g).double() * 3], batch_size=batch_size)


def fit(module, data=None, max_epochs=1, **settings):
    strategy = ldp.DPStrategy(**{"noise_multiplier": 0.0, **settings})
    trainer(strategy, max_epochs=max_epochs, max_steps=-1).fit(module, data or real_samples())
    return strategy


def clipped(loss_of_one, named, count):
    """Return the mean of the clipped per-sample gradients."""
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(count):
        grads = torch.autograd.grad(loss_of_one(i), list(named.values()))
        norm = torch.stack([g.norm() for g in grads]).norm()
        for name, g in zip(named, grads, strict=True):
            total[name] += g * min(1.0, 1.0 / float(norm))
    return {name: t / count for name, t in total.items()}


class Seeded(GAN):
    """Draws the same noise for the reference."""

    def noise(self, real):
        return torch.randn(len(real), NOISE_SIZE, dtype=real.dtype, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("toggle", [True, False])
@pytest.mark.parametrize("discriminator_first", [True, False])
def test_the_discriminator_is_private_and_the_generator_is_trained_as_ever(toggle, discriminator_first):
    module = Seeded(toggle, discriminator_first).double()
    reference, before = copy.deepcopy(module), parameters(module)
    strategy = fit(module)
    assert strategy.num_releases == 1

    real = torch.stack([x for (x,) in real_samples().dataset])
    z = reference.noise(real)

    def generator_step():
        grads = torch.autograd.grad(
            reference.judged(reference.generator(z), 1.0), list(reference.generator.parameters())
        )
        with torch.no_grad():
            for p, g in zip(reference.generator.parameters(), grads, strict=True):
                p -= 0.1 * g

    def discriminator_step():
        named = dict(reference.discriminator.named_parameters())
        mean = clipped(lambda i: reference.discriminator_loss(real[i : i + 1], z[i : i + 1]), named, N)
        with torch.no_grad():
            for name, p in named.items():
                p -= 0.1 * mean[name]

    steps = [generator_step, discriminator_step]
    for step in reversed(steps) if discriminator_first else steps:
        step()
    expected = updates(reference, before)
    for name, update in updates(module, before).items():
        assert update.norm() > 0
        torch.testing.assert_close(update, expected[name], rtol=1e-10, atol=1e-14)


def test_clipping_matters_in_that_comparison():
    module = Seeded().double()
    before = parameters(module)
    fit(copy.deepcopy(module))
    loose = copy.deepcopy(module)
    fit(loose, max_grad_norm=100.0)
    tight = copy.deepcopy(module)
    fit(tight, max_grad_norm=0.1)
    one, other = updates(loose, before), updates(tight, before)
    assert torch.equal(one["generator.0.weight"], other["generator.0.weight"])
    assert one["discriminator.0.weight"].norm() > 2 * other["discriminator.0.weight"].norm()


def test_noise_goes_to_the_discriminator_alone():
    first, second = Seeded().double(), Seeded().double()
    second.load_state_dict(first.state_dict())
    before = parameters(first)
    for module in (first, second):
        torch.manual_seed(5)
        fit(module, noise_multiplier=50.0)
    one, two = updates(first, before), updates(second, before)
    assert torch.equal(one["generator.0.weight"], two["generator.0.weight"])
    noise = torch.cat([(one[n] - two[n]).flatten() for n in one if n.startswith("discriminator")])
    std = 0.1 * 50.0 / N * 2**0.5
    assert 0.6 < float(noise.std()) / std < 1.4


def test_the_size_of_a_draw_is_hidden_from_the_generator():
    """With q < 1 every batch has the same number of rows, and rows that were not drawn add nothing."""
    sizes = []

    class Watched(Seeded):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            super().training_step(batch, batch_idx)

    module = Watched(lr=0.0).double()
    fit(module, real_samples(batch_size=1), max_epochs=3, self_check=False)
    trained = sizes[-36:]
    assert set(trained) == {N}  # N is below the largest likely draw, so it is the size


def test_phantoms_add_nothing():
    """At noise 0, two fits on draws of one size give sums over the drawn samples alone: an empty draw gives none."""

    class Counted(Seeded):
        seen = 0

        def on_before_optimizer_step(self, optimizer):
            if optimizer.param_groups[0]["params"][0] is self.discriminator[0].weight:
                drawn = self.trainer.strategy._stepping._num_real
                total = sum(float(p.grad.norm()) for p in self.discriminator.parameters())
                assert (total > 0) == (drawn > 0)
                Counted.seen += drawn == 0

    module = Counted(lr=0.0).double()
    fit(module, real_samples(batch_size=1), max_epochs=5, self_check=False)
    assert Counted.seen > 5  # a draw of 12 samples at q = 1/12 is empty in 35 % of all cases


def test_batch_normalisation_in_the_generator_sees_no_private_data():
    fit(GAN(norm=lambda: nn.BatchNorm1d(8)).double())
    module = GAN().double()
    module.discriminator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    with pytest.raises(ldp.UnsupportedModelError, match="'discriminator.1' is a BatchNorm1d"):
        fit(module)


class FeatureMatching(GAN):
    """A generator whose loss compares statistics of real and made samples: not public."""

    def training_step(self, batch, batch_idx):
        (real,) = batch
        z, (g, d) = self.noise(real), self.optimizers()
        self.step_of(g, lambda: (self.generator(z) - real).square().mean())
        self.step_of(d, lambda: self.discriminator_loss(real, z))


def test_a_generator_that_sees_the_data_is_private_and_both_releases_are_counted_together():
    strategy = fit(FeatureMatching().double(), noise_multiplier=2.0, max_epochs=3)
    assert strategy.num_releases == 3
    expected = ldp.compute_epsilon(noise_multiplier=2.0 / 2**0.5, sample_rate=1.0, num_steps=3, delta=strategy.delta)
    assert strategy.epsilon == pytest.approx(expected, rel=1e-9)


def test_both_releases_are_counted_together_after_the_dataloader_was_reloaded():
    class Reloads(FeatureMatching):
        def train_dataloader(self):
            return real_samples()

    strategy = ldp.DPStrategy(noise_multiplier=2.0)
    fit = trainer(strategy, max_epochs=3, max_steps=-1, reload_dataloaders_every_n_epochs=1)
    fit.fit(Reloads().double())
    assert [(r.noise_multiplier, n) for r, n in strategy.releases().items()] == [(2.0 / 2**0.5, 3)]
    assert strategy.record().mechanism.releases_per_draw == 2


def test_a_schedule_counts_batches_however_often_optimizers_step(tmp_path):
    class Twice(FeatureMatching):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.step_of(self.optimizers()[1], lambda: self.discriminator_loss(batch[0], self.noise(batch[0])))

    def fit_of(max_epochs, **resumed):
        schedule = [ldp.Stage(4), ldp.Stage(2, noise_factor=2.0)]
        strategy = ldp.DPStrategy(noise_multiplier=3**0.5, schedule=schedule)
        fit = trainer(strategy, max_epochs=max_epochs, max_steps=-1)
        fit.fit(Twice().double(), real_samples(batch_size=4), **resumed)
        fit.save_checkpoint(tmp_path / "a.ckpt")
        return [(pytest.approx(r.noise_multiplier), n) for r, n in strategy.releases().items()]

    assert fit_of(max_epochs=1) == [(1.0, 3)]
    assert fit_of(max_epochs=2, ckpt_path=tmp_path / "a.ckpt") == [(1.0, 4), (2.0, 2)]


def test_calibration_allows_for_both_releases():
    strategy = fit(FeatureMatching().double(), noise_multiplier=None, target_epsilon=3.0, max_epochs=4)
    one = ldp.calibrate_noise_multiplier(target_epsilon=3.0, target_delta=strategy.delta, sample_rate=1.0, num_steps=4)
    assert strategy.noise_multiplier == pytest.approx(one * 2**0.5, rel=2e-3)
    assert strategy.num_releases == 4
    assert 2.9 < strategy.epsilon <= 3.0


def test_a_public_generator_costs_nothing():
    strategy = fit(GAN().double(), noise_multiplier=2.0, max_epochs=3)
    expected = ldp.compute_epsilon(noise_multiplier=2.0, sample_rate=1.0, num_steps=3, delta=strategy.delta)
    assert strategy.epsilon == pytest.approx(expected, rel=1e-9)


class Manual(Regression):
    """Regression with its own loop; ``steps`` runs it."""

    def __init__(self, steps, net=None):
        super().__init__(net)
        self.automatic_optimization, self.steps = False, steps

    def training_step(self, batch, batch_idx):
        self.steps(self, self.optimizers(), lambda: super(Manual, self).training_step(batch, batch_idx))


def one_step(module, optimizer, loss_of):
    optimizer.zero_grad()
    module.manual_backward(loss_of())
    optimizer.step()


def two_backward_passes(module, optimizer, loss_of):
    optimizer.zero_grad()
    module.manual_backward(loss_of() / 2)
    module.manual_backward(loss_of() / 2)
    optimizer.step()


def by_closure(module, optimizer, loss_of):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        module.manual_backward(loss)
        return loss

    optimizer.step(closure)


def module_zero_grad(module, optimizer, loss_of):
    module.manual_backward(loss_of() * 7)
    module.zero_grad()
    one_step(module, optimizer, loss_of)


def without_manual_backward(module, optimizer, loss_of):
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [one_step, two_backward_passes, by_closure, module_zero_grad])
def test_a_loop_of_ones_own_equals_automatic_optimization(steps):
    data = loader(dtype=torch.float64, batch_size=20)
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(True), nn.Linear(8, 2))
    automatic = Regression(net.double())
    manual = Manual(steps, copy.deepcopy(net))
    before = parameters(automatic)
    fit(automatic, data, max_epochs=3)
    strategy = fit(manual, data, max_epochs=3)
    assert strategy.num_releases == 3
    expected = updates(automatic, before)
    for name, update in updates(manual, before).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-9, atol=1e-13)


def test_schedules_and_counters_are_not_moved_by_the_looking():
    class Scheduled(Manual):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def steps(module, optimizer, loss_of):
        one_step(module, optimizer, loss_of)
        module.lr_schedulers().step()

    module = Scheduled(steps)
    fit(module, loader(batch_size=20), max_epochs=3)
    assert module.optimizers().param_groups[0]["lr"] == 0.5**3
    assert module.trainer.global_step == 3


def refused(match, steps, error=ldp.PrivacyError, **settings):
    with pytest.raises(error, match=match):
        fit(Manual(steps), loader(batch_size=20), max_epochs=2, **settings)


def test_gradients_changed_before_the_release():
    def steps(module, optimizer, loss_of):
        optimizer.zero_grad()
        module.manual_backward(loss_of())
        module.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()

    refused("was written to between the backward pass and the optimizer's step.*on_before_optimizer_step", steps)


def test_gradients_that_add_up_over_batches():
    def steps(module, optimizer, loss_of):
        module.manual_backward(loss_of())
        optimizer.step()

    refused("was not zeroed before the backward pass.*zero_grad", steps)


def test_more_steps_than_were_observed():
    def steps(module, optimizer, loss_of):
        for _ in range(1 + (module.trainer.global_step > 0)):
            one_step(module, optimizer, loss_of)

    refused("release number 2 from one draw.*1 were made when", steps)


def test_no_step_at_all():
    refused(
        r"optimizer 0 \(SGD\) made no step when the training step was observed",
        lambda module, optimizer, loss_of: module.manual_backward(loss_of()),
        ldp.PrivacyConfigurationError,
    )


def test_a_backward_pass_past_lightning_is_recorded_too():
    data = loader(dtype=torch.float64, batch_size=20)
    module = Manual(without_manual_backward, nn.Linear(3, 2).double())
    reference, before = Regression(copy.deepcopy(module.net)), parameters(module)
    fit(module, data)
    fit(reference, data)
    expected = updates(reference, before)
    for name, update in updates(module, before).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-9, atol=1e-13)


def test_a_step_outside_the_training_step():
    class Late(Manual):
        def on_train_batch_end(self, *_):
            self.optimizers().step()

    with pytest.raises(ldp.PrivacyError, match="stepped outside training_step"):
        fit(Late(one_step), loader(batch_size=20))


@pytest.mark.parametrize("setting", [{"max_physical_batch_size": 2}, {"clipping_engine": "loop"}])
def test_a_logical_batch_is_not_divided(setting):
    refused("with automatic_optimization=False.*whole logical batch", one_step, **setting)


def test_a_contrastive_loss_is_found_here_too():
    def steps(module, optimizer, loss_of):
        x = F.normalize(module.net(module.x))
        optimizer.zero_grad()
        module.manual_backward((x @ x.T).mean())
        optimizer.step()

    class Contrastive(Manual):
        def training_step(self, batch, batch_idx):
            self.x = batch[0]
            super().training_step(batch, batch_idx)

    with pytest.raises(ldp.UnsupportedModelError, match=r"\(c\).*the gradient of a sample"):
        fit(Contrastive(steps), loader(batch_size=20))


class Matching(GAN):
    """A generator that also sees the samples, weighed by ``weight``."""

    def __init__(self, weight, match, **settings):
        super().__init__(**settings)
        self.weight, self.match = weight, match

    def training_step(self, batch, batch_idx):
        (real,) = batch
        z, (g, d) = self.noise(real), self.optimizers()
        fake, weight = self.generator(z), self.weight(self)
        loss = self.judged(fake, 1.0)
        self.step_of(g, lambda: loss if weight is None else loss + weight * self.match(fake, real))
        self.step_of(d, lambda: self.discriminator_loss(real, z))


def test_samples_that_only_take_part_with_weight_zero_make_an_optimizer_private():
    module = Matching(lambda m: m.current_epoch / 10, F.mse_loss).double()
    strategy = fit(module, noise_multiplier=2.0, max_epochs=2)
    expected = ldp.compute_epsilon(noise_multiplier=2.0 / 2**0.5, sample_rate=1.0, num_steps=2, delta=strategy.delta)
    assert strategy.epsilon == pytest.approx(expected, rel=1e-9)


def test_samples_that_take_part_later_are_found_at_that_step():
    module = Matching(lambda m: 1.0 if m.current_epoch else None, F.mse_loss).double()
    with pytest.raises(ldp.PrivacyError, match=r"'generator.0.weight' depends on the training data now"):
        fit(module, max_epochs=2)


@pytest.mark.parametrize("read", [lambda t: t, lambda t: t.item()], ids=["tensor", "number"])
def test_statistics_that_vanish_for_equal_samples_are_no_public_loss(read):
    module = Matching(
        lambda m: 1.0, lambda fake, real: fake.square().mean() * read(real.std(0, unbiased=False).sum())
    ).double()
    with pytest.raises(ldp.UnsupportedModelError, match=r"\(c\).*samples influence each other|changed when"):
        fit(module)


def test_a_rare_label_makes_an_optimizer_private():
    class Conditional(GAN):
        def training_step(self, batch, batch_idx):
            real, label = batch
            z, (g, d) = self.noise(real) + label[:, None], self.optimizers()
            self.step_of(g, lambda: self.judged(self.generator(z), 1.0))
            self.step_of(d, lambda: self.discriminator_loss(real, z))

    data = [(x, torch.tensor(float(i == 5))) for i, (x,) in enumerate(real_samples().dataset)]
    strategy = fit(Conditional().double(), DataLoader(data, batch_size=N), noise_multiplier=2.0)
    assert strategy._run.mechanism.releases_per_draw == 2


@pytest.mark.parametrize("frozen", [True, False], ids=["unfrozen", "added"])
def test_what_joins_a_public_optimizer_later_is_looked_at(frozen):
    class Growing(GAN):
        def __init__(self):
            super().__init__()
            self.sight = nn.Linear(4, NOISE_SIZE).requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.sight.requires_grad_(True)
                if not frozen:
                    self.trainer.optimizers[0].add_param_group({"params": list(self.sight.parameters())})

        def training_step(self, batch, batch_idx):
            (real,) = batch
            z, (g, d) = self.noise(real), self.optimizers()
            sight = self.sight(real) if self.current_epoch else 0.0
            self.step_of(g, lambda: self.judged(self.generator(z + sight), 1.0))
            self.step_of(d, lambda: self.discriminator_loss(real, z))

        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            if frozen:
                optimizers[0].add_param_group({"params": list(self.sight.parameters())})
            return optimizers

    with pytest.raises(ldp.PrivacyError, match="'(generator.0.weight|sight.weight)' depends on the training data now"):
        fit(Growing().double(), max_epochs=2)


def test_steps_that_samples_decide_on():
    class Balanced(GAN):
        def training_step(self, batch, batch_idx):
            for _ in range(1 + (batch[0].sum().item() > 0)):
                super().training_step(batch, batch_idx)

    with pytest.raises(ldp.UnsupportedModelError, match="which optimizers step.*depends on the samples"):
        fit(Balanced().double())


def test_a_public_optimizer_does_not_step_outside_the_training_step():
    class Late(GAN):
        def on_train_batch_end(self, *_):
            self.optimizers()[0].step()

    with pytest.raises(ldp.PrivacyError, match="stepped outside training_step"):
        fit(Late().double())


@pytest.mark.parametrize("real_first", [True, False])
def test_real_and_made_samples_in_one_batch_are_exact(real_first):
    class Joined(Seeded):
        def discriminator_loss(self, real, z):
            parts = [(real, torch.ones(len(real), 1)), (self.generator(z).detach(), torch.zeros(len(real), 1))]
            x, truth = (torch.cat(pair) for pair in zip(*(parts if real_first else parts[::-1]), strict=True))
            return F.binary_cross_entropy_with_logits(self.discriminator(x), truth.to(x))

    joined, apart = Joined().double(), Seeded().double()
    apart.load_state_dict(joined.state_dict())
    before = parameters(joined)
    fit(joined)
    fit(apart)
    expected = updates(apart, before)
    for name, update in updates(joined, before).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("offset", range(4))
def test_real_and_made_samples_in_random_order_have_no_gradients_of_their_own(offset):
    class Shuffled(GAN):
        def discriminator_loss(self, real, z):
            torch.rand(1 + offset)
            x = torch.cat([real, self.generator(z).detach()])
            truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(x)
            order = torch.cat([torch.randperm(len(x)) for _ in range(1 + offset)])[-len(x) :]
            return F.binary_cross_entropy_with_logits(self.discriminator(x[order]), truth[order])

    with pytest.raises(ldp.UnsupportedModelError, match="no sample has a gradient of its own|samples influence"):
        fit(Shuffled().double())


class Rarely(GAN):
    """A generator that steps in every fourth training step."""

    def __init__(self, first, path=None):
        super().__init__()
        self.first, self.path, self.indices = first, path, []

    def training_step(self, batch, batch_idx):
        (real,) = batch
        z, (g, d) = self.noise(real), self.optimizers()
        self.step_of(d, lambda: self.discriminator_loss(real, z))
        if batch_idx % 4 == self.first:
            self.step_of(g, lambda: self.judged(self.generator(z), 1.0))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.indices.append((batch_idx, self.global_step))
        if self.path is not None and batch_idx == 2:
            self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_optimizers_that_do_not_step_every_time(first, tmp_path):
    """Also where a fit is resumed at a batch in which one does not step."""
    module = Rarely(first, tmp_path / "third.ckpt").double()
    strategy = fit(module, real_samples(batch_size=2), noise_multiplier=1.0)
    steps = sum(k % 4 == first for k in range(6))
    assert module.indices[-1] == (5, 6 + steps)
    assert strategy._run.mechanism.releases_per_draw == 1
    assert strategy.num_releases == 6

    resumed, again = Rarely(first).double(), ldp.DPStrategy(noise_multiplier=1.0)
    trainer(again, max_epochs=1, max_steps=-1).fit(resumed, real_samples(batch_size=2), ckpt_path=module.path)
    assert resumed.indices[0][0] in (2, 3)
    assert again.num_releases >= 6


def test_a_generator_that_steps_now_and_then_does_not_end_the_budget_early():
    """``max_steps`` counts the steps of all optimizers, and how many there are in a training step may change."""

    class Rare(Seeded):
        def training_step(self, batch, batch_idx):
            z, (g, d) = self.noise(batch[0]), self.optimizers()
            self.step_of(d, lambda: self.discriminator_loss(batch[0], z))
            if batch_idx % 5 == 0:
                self.step_of(g, lambda: self.judged(self.generator(z), 1.0))

    strategy = ldp.DPStrategy(target_epsilon=3.0)
    fit = trainer(strategy, max_steps=24)
    fit.fit(Rare().double(), real_samples(batch_size=2))
    assert fit.global_step == 24
    assert strategy.num_releases == 18  # three epochs of six batches, in each of which the generator steps twice
    assert 2.3 < strategy.epsilon <= 3.0


def test_a_resumed_fit_knows_how_many_releases_a_draw_gives(tmp_path):
    """Before its first step: nothing is left of the budget, and the fit ends there."""

    def run(strategy, **arguments):
        at = trainer(strategy, max_epochs=50, max_steps=-1, callbacks=[ldp.PrivacyBudgetStopping()])
        at.fit(FeatureMatching().double(), real_samples(), **arguments)
        return at

    settings = {"noise_multiplier": 4.0, "target_epsilon": 3.0, "target_delta": 1e-3}
    first = ldp.DPStrategy(**settings)
    run(first).save_checkpoint(tmp_path / "a.ckpt")
    assert first.num_releases > 1
    again = ldp.DPStrategy(**settings)
    run(again, ckpt_path=tmp_path / "a.ckpt")
    assert (again.num_releases, again.budget.releases_left) == (first.num_releases, 0)
    assert again.noise_multiplier == 4.0
