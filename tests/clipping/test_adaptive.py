"""Adaptive clipping: the bound's way, against the published rule by hand; what it costs, against dp-accounting."""

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_dp as ldp
from lightning_dp.bookkeeping import Book
from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.coverage.table import _settings
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_step import PrivateStep
from lightning_dp.quantile_bound import QuantileBound
from lightning_dp.reporting import read_report
from tests.models import Regression, ZeroGradient, clipped_mean, loader, trainer


def by_hand(module, data, steps, start, quantile=0.5, rate=0.2):
    """The bounds before every step and after the last, and the gradients, by a loop over the samples."""
    x, y = data.dataset.tensors
    optimizer, bounds, gradients = module.configure_optimizers(), [start], []
    for _ in range(steps):
        mean = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), len(x), bounds[-1])
        below = 0
        for i in range(len(x)):
            loss = module.training_step((x[i : i + 1], y[i : i + 1]), 0)
            parts = torch.autograd.grad(loss, list(module.parameters()))
            below += math.sqrt(sum(float(part.square().sum()) for part in parts)) <= bounds[-1]
        for name, p in module.named_parameters():
            p.grad = mean[name]
        optimizer.step()
        gradients.append(mean)
        bounds.append(bounds[-1] * math.exp(-rate * (below / len(x) - quantile)))
    return bounds, gradients


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


class Bounds(pl.Callback):
    """Notes the bound before every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.strategy.max_grad_norm)


@pytest.mark.parametrize(
    ("settings", "physical"), [({}, 1), ({}, 7), ({}, 20), ({"quantile": 0.9, "learning_rate": 0.5}, 7)]
)
def test_the_way_of_the_bound(settings, physical):
    data, module, noted = loader(n=20, batch_size=20, dtype=torch.float64), Regression(network(), lr=0.1), Bounds()
    again = Regression(network(), lr=0.1)
    expected, gradients = by_hand(
        again, data, 6, 5.0, settings.get("quantile", 0.5), settings.get("learning_rate", 0.2)
    )
    assert len(set(expected)) > 3
    clipping = ldp.AdaptiveClipping(5.0, **settings)
    dp = ldp.DPStrategy(noise_multiplier=0, clipping=clipping, max_physical_batch_size=physical)
    trainer(dp, max_steps=6, callbacks=[noted]).fit(module, data)
    assert [*noted.seen, dp.max_grad_norm] == pytest.approx(expected, rel=1e-12)
    for name, p in module.named_parameters():
        assert torch.allclose(p.grad, gradients[-1][name], rtol=1e-10)
    assert clipping.max_grad_norm == 5.0  # the user's object is as it was


def test_the_bound_finds_the_quantile():
    """Norms are 1 to 99: whatever the first bound, the share below ends near the quantile."""
    norms = torch.arange(1.0, 100.0)
    for start, quantile in ((1e-3, 0.5), (1e5, 0.25), (50.0, 0.9)):
        bound = QuantileBound(ldp.AdaptiveClipping(start, quantile, learning_rate=0.5))
        for _ in range(150):
            bound.begin(Mechanism(0.0, bound.clipping, 0.5, 99.0))
            bound.add(norms)
            bound.move(SecretRandom())
        assert bound.clipping.max_grad_norm == pytest.approx(99 * quantile, abs=3)


NOISES = [(1.0, 256.0, None), (1.0, 4.0, 0.51), (3.0, 1000.0, 2.0)]


def divided(noise_multiplier, expected, count_noise_std):
    clipping = ldp.AdaptiveClipping(count_noise_std=count_noise_std)
    count = clipping.count_noise(noise_multiplier, expected)
    return clipping.gradient_noise_multiplier(noise_multiplier, expected), count


@pytest.mark.parametrize(("noise", "expected", "count_noise_std"), NOISES)
def test_gradient_and_count_cost_what_one_gradient_costs(noise, expected, count_noise_std):
    """Composed by dp-accounting, with and without sampling; the count is a Gaussian release of sensitivity 1/2."""
    gradient, count = divided(noise, expected, count_noise_std)
    assert gradient > noise
    pair = ComposedDpEvent([GaussianDpEvent(gradient), GaussianDpEvent(count / 0.5)])
    one = GaussianDpEvent(noise)

    def epsilon(accountant, event, delta=1e-5):
        return accountant.compose(event).get_epsilon(delta)

    adding = NeighboringRelation.ADD_OR_REMOVE_ONE
    assert epsilon(PLDAccountant(adding), pair) == pytest.approx(epsilon(PLDAccountant(adding), one), rel=1e-3)
    for rate, steps in ((0.01, 1000), (0.5, 20)):
        sampled = [SelfComposedDpEvent(PoissonSampledDpEvent(rate, event), steps) for event in (pair, one)]
        both, alone = (epsilon(RdpAccountant(neighboring_relation=adding), event) for event in sampled)
        assert both == pytest.approx(alone, rel=1e-9)
        less = ComposedDpEvent([GaussianDpEvent(noise), GaussianDpEvent(count / 0.5)])  # as if the count were free
        sampled = SelfComposedDpEvent(PoissonSampledDpEvent(rate, less), steps)
        assert epsilon(RdpAccountant(neighboring_relation=adding), sampled) > alone * (1 + 1e-5)


def test_by_default_the_gradient_has_hardly_more_noise():
    for noise in (0.3, 1.0, 20.0):
        for expected in (1.0, 50.0, 1e5):
            gradient, count = divided(noise, expected, None)
            assert noise < gradient <= 1.0051 * noise
            assert count == max(expected / 20, 5 * noise)


def test_one_sample_moves_the_count_by_a_half():
    for norm in (0.0, 1.0, 1.0 + 1e-9, 1e30, float("inf"), float("nan")):
        bounds = []
        for norms in ([0.5, 2.0, 0.1], [0.5, 2.0, 0.1, norm]):
            bound = QuantileBound(ldp.AdaptiveClipping(1.0, learning_rate=1.0))
            bound.begin(Mechanism(0.0, bound.clipping, 0.5, 1.0))
            bound.add(torch.tensor(norms, dtype=torch.float64))
            bound.move(SecretRandom())
            bounds.append(math.log(bound.clipping.max_grad_norm))
        assert bounds[1] - bounds[0] == pytest.approx(-0.5 if norm <= 1 else 0.5)


def test_phantoms_do_not_count():
    """Of four rows two were drawn, then none: the bound moves by the two, and then by nothing at a quantile of 1/2."""
    bound = QuantileBound(ldp.AdaptiveClipping(1.0, learning_rate=1.0))
    step = PrivateStep({"p": nn.Parameter(torch.zeros(1))}, SecretRandom(), mean_loss=False, bound=bound)
    moved = []
    for num_real in (2, 0):
        step.begin(Mechanism(0.0, bound.clipping, 0.5, 4.0))
        step.collect(Book(4, {"p": [Dense(torch.tensor([[0.1], [0.2], [0.3], [9.0]]))]}), num_real)
        step.release()
        moved.append(bound.clipping.max_grad_norm)
    assert moved == pytest.approx([math.exp(-0.25), math.exp(-0.25)])


def test_the_noise_of_gradient_and_count():
    """A loss of gradient zero: each coordinate of the update has noise of a known scale, and so has the bound."""
    noise, count_noise, rate = 2.0, 1.5, 0.01
    module = ZeroGradient(nn.Linear(3, 4000))
    clipping = ldp.AdaptiveClipping(0.5, learning_rate=rate, count_noise_std=count_noise)
    dp = ldp.DPStrategy(noise_multiplier=noise, clipping=clipping)
    trainer(dp, max_steps=1).fit(module, loader(batch_size=5))
    expected = (noise**-2 - (2 * count_noise) ** -2) ** -0.5 * 0.5 / 5
    assert float(module.net.weight.grad.std()) == pytest.approx(expected, rel=0.03)
    assert expected > 1.3 * noise * 0.5 / 5
    bound, random, moves = QuantileBound(clipping), SecretRandom(), []
    for _ in range(4000):
        before = bound.clipping.max_grad_norm
        bound.begin(Mechanism(noise, bound.clipping, 0.5, 5.0))
        bound.move(random)  # an empty draw: noise alone, about a half
        moves.append(math.log(bound.clipping.max_grad_norm / before))
    moved = torch.tensor(moves, dtype=torch.float64)
    assert float(moved.std()) == pytest.approx(rate * count_noise / 5, rel=0.05)
    assert abs(float(moved.mean())) < 4 * rate * count_noise / 5 / math.sqrt(4000)


def test_budget_and_ledger_are_those_of_the_accounted_noise():
    dp = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3, clipping="adaptive")
    flat = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    for strategy in (dp, flat):
        trainer(strategy, max_steps=4).fit(Regression(), loader())
    assert dp.noise_multiplier == flat.noise_multiplier
    assert dp.releases() == flat.releases()
    assert dp.epsilon == flat.epsilon


def test_a_schedule_changes_both_noises():
    mechanism = Mechanism(1.0, ldp.AdaptiveClipping(), 0.1, 100.0).scaled(2.0, 4.0)
    assert mechanism.clipping.count_noise(mechanism.noise_multiplier, mechanism.expected_batch_size) == 20.0
    assert mechanism.noise_std == pytest.approx((2.0**-2 - 40.0**-2) ** -0.5)
    dp = ldp.DPStrategy(
        noise_multiplier=1.0,
        clipping=ldp.AdaptiveClipping(count_noise_std=0.8),
        schedule=[ldp.Stage(1), ldp.Stage(1, noise_factor=2.0)],
    )
    with pytest.raises(
        ldp.PrivacyConfigurationError, match=r"count_noise_std=0.8 of AdaptiveClipping with noise .* 2: "
    ):
        trainer(dp).fit(Regression(), loader())
    assert dp.num_releases == 0


def test_a_resumed_fit_goes_on_with_the_bound():
    """Without noise and with every sample in every batch nothing is left to chance."""

    def fit(steps, resumed=None, **settings):
        dp = ldp.DPStrategy(noise_multiplier=0, clipping=ldp.AdaptiveClipping(5.0))
        data, module = loader(n=20, batch_size=20, dtype=torch.float64), Regression(network(), lr=0.1)
        kept = ModelCheckpoint(".", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer(dp, max_steps=steps, callbacks=[kept, ldp.PrivacyReport()]).fit(module, data, ckpt_path=resumed)
        return dp.max_grad_norm, module

    bound, module = fit(7)
    resumed, again = fit(7, "step=3.ckpt")
    halfway = read_report("step=3.ckpt").record.mechanism
    assert resumed == bound != 5.0
    assert torch.equal(again.net[0].weight, module.net[0].weight)
    assert halfway.clipping == "adaptive (quantile 0.5, learning rate 0.2)"
    assert (
        halfway.max_grad_norm
        == halfway.sensitivity
        == torch.load("step=3.ckpt")["lightning_dp"]["bound"]["max_grad_norm"]
    )


def test_a_second_fit_goes_on_with_the_bound():
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping="adaptive")
    fit = trainer(dp, max_steps=2, callbacks=[noted := Bounds()])
    fit.fit(Regression(), loader())
    between = dp.max_grad_norm
    fit.fit_loop.epoch_loop.max_steps = 4
    fit.fit(fit.lightning_module, loader())
    assert noted.seen[0] == 1.0
    assert noted.seen[2] == between != 1.0


def test_a_checkpoint_of_another_clipping_has_no_bound():
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=2)
    fit.fit(Regression(), loader())
    fit.save_checkpoint("a.ckpt")
    noted = Bounds()
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping=ldp.AdaptiveClipping(2.5))
    trainer(dp, max_steps=3, callbacks=[noted]).fit(Regression(), loader(), ckpt_path="a.ckpt")
    assert noted.seen == [2.5]


@pytest.mark.parametrize("value", [0.0, float("nan"), "one", None, -1.0])
def test_a_bound_that_was_changed_by_hand_is_refused(value):
    with pytest.raises(ldp.PrivacyError, match="the bound of AdaptiveClipping in this checkpoint is"):
        QuantileBound(ldp.AdaptiveClipping()).load_state_dict({"max_grad_norm": value})


def test_the_bound_stays_a_number():
    for sign, share in ((1, 0.0), (-1, 1.0)):
        bound = QuantileBound(ldp.AdaptiveClipping(1.0, quantile=1 - share, learning_rate=1000.0))
        for _ in range(3):
            bound.begin(Mechanism(0.0, bound.clipping, 0.5, 1.0))
            bound.add(torch.tensor([0.0 if share else float("nan")]))
            bound.move(SecretRandom())
        assert bound.clipping.max_grad_norm == pytest.approx(10 ** (sign * 20))


def test_the_bound_is_logged():
    log, dp = CSVLogger("."), ldp.DPStrategy(noise_multiplier=1.0, clipping="adaptive")
    callbacks = [ldp.PrivacyMonitor(summary=False), noted := Bounds()]
    trainer(dp, max_steps=4, logger=log, log_every_n_steps=1, callbacks=callbacks).fit(Regression(), loader())
    with Path(log.log_dir, "metrics.csv").open() as file:
        logged = [float(row["privacy/max_grad_norm"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx([*noted.seen[1:], dp.max_grad_norm], rel=1e-5)
    assert len(set(logged)) == 4


class Manual(Regression):
    """Steps its optimizer some times in every training step."""

    def __init__(self, times):
        super().__init__(network(), lr=0.1)
        self.automatic_optimization, self.times = False, times

    def training_step(self, batch, batch_idx):
        for _ in range(self.times):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_manual_optimization():
    data, noted = loader(n=20, batch_size=20, dtype=torch.float64), Bounds()

    class Automatic(Regression):
        pass

    expected, _ = by_hand(Automatic(network(), lr=0.1), data, 4, 5.0)
    dp = ldp.DPStrategy(noise_multiplier=0, clipping=ldp.AdaptiveClipping(5.0))
    trainer(dp, max_steps=4, callbacks=[noted]).fit(Manual(1), data)
    assert [*noted.seen, dp.max_grad_norm] == pytest.approx(expected, rel=1e-12)


def test_a_plan_leaves_the_bound_and_shows_the_clipping():
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping=ldp.AdaptiveClipping(2.5, count_noise_std=4.0))
    plan = ldp.plan(trainer(dp), Regression(), loader(), show=False)
    assert not plan.is_refused
    assert plan.clipping == "adaptive (quantile 0.5, learning rate 0.2, count noise 4)"
    shown = dict(_settings(plan))
    assert (shown["clipping"], shown["max_grad_norm"]) == (plan.clipping, "2.5")
    assert dp.max_grad_norm == plan.max_grad_norm == 2.5


def test_several_releases_from_one_draw_are_refused():
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping="adaptive")
    with pytest.raises(ldp.PrivacyConfigurationError, match="AdaptiveClipping with 2 releases from one draw"):
        trainer(dp, max_steps=4).fit(Manual(2), loader(dtype=torch.float64))
    assert dp.num_releases == 0
