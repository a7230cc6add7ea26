"""Full training for some epochs, then the biases alone: by comparison with two fits by hand, with and without a resume.

Epochs are of one step on the whole dataset, without noise, unless said otherwise.
"""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as schedules

import lightning_dp as ldp
from lightning_dp.callbacks.selection import is_bias
from tests.models import loader, parameters, trainer
from tests.strategies.reference import Regression, assert_equal, by_hand, network, private_fit, whole

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR of torch 2.6

EPOCHS = {"max_epochs": 5, "max_steps": -1}
RESUMED = {"enable_checkpointing": False}
UNCHECKED = {"noise_multiplier": 0, "self_check": False}  # most tests are of what is trained, and looks take long


class Scheduled(Regression):
    """Two groups of different rates, and a schedule."""

    def __init__(self, net=None, lr=0.1, optimizer=torch.optim.Adam, schedule=None):
        super().__init__(net or network(), lr, optimizer)
        self.schedule = schedule

    def groups(self):
        return [{"params": self.net[0].parameters(), "lr": self.lr / 2}, {"params": self.net[1:].parameters()}]

    def configure_optimizers(self):
        optimizer = self.optimizer(self.groups(), lr=self.lr)
        return {"optimizer": optimizer, **({"lr_scheduler": self.schedule(optimizer)} if self.schedule else {})}


def two_phases(after_epoch=2, **settings):
    return ldp.BiasOnlyFinetuning(after_epoch=after_epoch, **settings)


def expected_after(module, data, first, second, factor=1.0, rates=lambda step: 1.0, trained=is_bias):
    """Return the parameters after two phases by hand, each with an optimizer of its own."""
    module = copy.deepcopy(module)
    groups = module.groups() if hasattr(module, "groups") else [{"params": module.parameters()}]
    named, lists = dict(module.named_parameters()), [(list(g["params"]), g.get("lr", module.lr)) for g in groups]
    for start, steps, scale in ((0, first, 1.0), (first, second, factor)):
        if start:
            for name, p in named.items():
                p.requires_grad_(trained(name))

        def make(m, scale=scale):
            kept = [{"params": [p for p in ps if p.requires_grad], "lr": lr * scale} for ps, lr in lists]
            return m.optimizer(kept, lr=m.lr)

        def schedule(optimizer, m, start=start):
            base, at = [group["lr"] for group in optimizer.param_groups], [start]

            def set_rates():
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * rates(at[0])
                at[0] += 1

            set_rates()
            return set_rates

        by_hand(module, data, steps, optimizer=make, schedule=schedule, on_a_copy=False)
    return parameters(module)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [(torch.optim.SGD, 10.0), (torch.optim.Adam, 1.0), (torch.optim.Adam, 10.0), (torch.optim.AdamW, 10.0)],
)
def test_the_second_phase_is_that_of_a_new_optimizer(optimizer, factor):
    module, data = Scheduled(optimizer=optimizer), whole()
    expected = expected_after(module, data, 2, 3, factor)
    if factor != 1:
        same_rate = expected_after(module, data, 2, 3)
        assert not torch.allclose(expected["net.0.bias"], same_rate["net.0.bias"], rtol=1e-3)
    fit = private_fit(module, data, 5, UNCHECKED, callbacks=[two_phases(learning_rate_factor=factor)], **EPOCHS)
    assert_equal(module, expected)
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == pytest.approx([0.05 * factor, 0.1 * factor])


class Filtered(Regression):
    """Gives the optimizer what requires a gradient, as many modules do."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


def test_momentum_of_the_first_phase_is_forgotten_and_frozen_parameters_leave_the_optimizer():
    module, data = Filtered(network(), lr=0.1), whole()
    module.optimizer = lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)
    expected = expected_after(module, data, 2, 3, trained=lambda name: is_bias(name) or name == "net.3.weight")
    fit = private_fit(module, data, 5, UNCHECKED, callbacks=[two_phases(unfreeze="net.3")], **EPOCHS)
    assert_equal(module, expected)
    trained = {id(module.get_parameter(f"net.{name}")) for name in ("0.bias", "2.bias", "3.bias", "3.weight")}
    (optimizer,) = fit.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert {id(p) for p in optimizer.state} == trained
    assert {id(p) for p in module.parameters() if p.requires_grad or p.grad is not None} == trained


RATES = {
    "LambdaLR": (
        lambda o: schedules.LambdaLR(o, lambda k: 1 / (1 + k)),
        lambda k: 1 / (1 + k),
    ),
    "SequentialLR": (
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.5, 1.0, 3), schedules.ExponentialLR(o, 0.5)], milestones=[3]
        ),
        lambda k: 0.5 + k / 6 if k < 3 else 0.5 ** (k - 3),
    ),
}


@pytest.mark.parametrize(
    ("kind", "resumed"),
    [(kind, False) for kind in RATES]
    + [pytest.param(k, True, marks=() if k == "SequentialLR" else pytest.mark.slow) for k in RATES],
)
def test_schedules_go_on_by_the_new_rate(kind, resumed, tmp_path):
    make, rates = RATES[kind]
    module, data = Scheduled(schedule=make, optimizer=torch.optim.SGD), whole()
    expected = expected_after(module, data, 2, 3, 10.0, rates)
    if resumed:
        module = stopped_and_resumed(module, data, 3, tmp_path, learning_rate_factor=10.0)
    else:
        private_fit(module, data, 5, UNCHECKED, callbacks=[two_phases(learning_rate_factor=10.0)], **EPOCHS)
    assert_equal(module, expected)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_with_rates_of_its_own_is_refused_before_the_first_step():
    def schedule(optimizer):
        return schedules.OneCycleLR(optimizer, 0.1, total_steps=9)

    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fit = trainer(dp, callbacks=[two_phases(learning_rate_factor=10.0)], **EPOCHS)
    with pytest.raises(ldp.PrivacyConfigurationError, match="learning_rate_factor=10 with the scheduler OneCycleLR"):
        fit.fit(Scheduled(schedule=schedule), whole())
    assert dp.num_releases == 0
    private_fit(Scheduled(schedule=schedule), whole(), 5, UNCHECKED, callbacks=[two_phases()], **EPOCHS)


# ---- resumes -----------------------------------------------------------------------------------------------------


def stopped_and_resumed(module, data, steps, folder, **settings):
    """Return a copy of the module that was stopped after some steps, and resumed in new objects."""
    first, second = copy.deepcopy(module), copy.deepcopy(module)
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[two_phases(**settings), kept], **EPOCHS).fit(first, data)
    resumed = trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[two_phases(**settings)], **RESUMED, **EPOCHS)
    resumed.fit(second, data, ckpt_path=folder / f"step={steps}.ckpt")
    assert resumed.global_step == 5
    return second


@pytest.mark.parametrize(
    ("steps", "filtered"),
    [(1, True), (2, True), (3, True), (2, False), *[pytest.param(k, False, marks=pytest.mark.slow) for k in (1, 3, 4)]],
)
def test_a_resume_gives_the_same(steps, filtered, tmp_path):
    """Steps 1 and 2 are of the first phase, and a resume after 2 begins with the switch."""
    module, data = (Filtered(network(), 0.1) if filtered else Scheduled()), whole()
    if filtered:
        module.optimizer = lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)
    expected = expected_after(module, data, 2, 3, 10.0)
    assert_equal(stopped_and_resumed(module, data, steps, tmp_path, learning_rate_factor=10.0), expected)


WHENS = ("in the epoch", "at its end", "after validation")
FAST = {(2, "in the epoch"), (2, "at its end"), (2, "after validation"), (3, "in the epoch")}


@pytest.mark.parametrize(
    ("step", "when"),
    [
        pytest.param(k, when, marks=() if (k, when) in FAST else pytest.mark.slow)
        for when in WHENS
        for k in (range(1, 8) if when == WHENS[0] else (2, 4, 6))
    ],
)
def test_a_resume_in_an_epoch_of_several_steps(step, when, tmp_path):
    """The epoch that begins after two steps is the first of the second phase, wherever the checkpoint is from."""
    at_end = when != "in the epoch"
    data = loader(n=12, batch_size=6, dtype=torch.float64)
    kept = ModelCheckpoint(
        tmp_path,
        filename="{step}",
        save_top_k=-1,
        save_on_train_epoch_end=when == "at its end",
        **({"every_n_epochs": 1} if at_end else {"every_n_train_steps": 1}),
    )
    epochs, validate = {"max_epochs": 4, "max_steps": -1}, whole(shuffle=False) if when == "after validation" else None
    dp = {"noise_multiplier": 1.0, "self_check": False}
    trainer(ldp.DPStrategy(**dp), callbacks=[two_phases(1), kept], **epochs).fit(Scheduled(), data, validate)
    seen = Trained()
    resumed = trainer(ldp.DPStrategy(**dp), callbacks=[two_phases(1), seen], **RESUMED, **epochs)
    resumed.fit(Scheduled(), data, validate, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.global_step == 8
    assert resumed.strategy.num_releases == 8 + (8 - step)  # the journal knows of those that were made in vain
    assert seen.found == [(k, 6 if k < 2 else 3) for k in range(step, 8)]


class Trained(pl.Callback):
    """Notes what the optimizer steps by, before every step: its number, and how many parameters get a gradient."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        released = [p for p in pl_module.parameters() if p.grad is not None]
        assert {id(p) for p in released} <= {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.found.append((trainer.global_step, len(released)))


def test_a_second_fit_of_the_same_trainer_stays_in_the_second_phase():
    module, data = Filtered(network(), 0.1), whole()
    module.optimizer = lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)
    seen = Trained()
    fit = private_fit(
        module, data, 3, UNCHECKED, callbacks=[two_phases(learning_rate_factor=2.0), seen], max_epochs=3, max_steps=-1
    )
    fit.fit_loop.max_epochs = 5
    before = parameters(module)
    fit.fit(module, data)
    assert seen.found == [(0, 6), (1, 6), (2, 3), (3, 3), (4, 3)]
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.2]
    assert all(torch.equal(p, before[name]) == (not is_bias(name)) for name, p in module.named_parameters())


def test_a_module_that_was_frozen_by_a_fit_is_resumed_in_the_same_process(tmp_path):
    module, data = Scheduled(), whole()
    expected = expected_after(module, data, 2, 3)
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[two_phases(), kept], **EPOCHS).fit(module, data)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[two_phases()], **EPOCHS).fit(
        module, data, ckpt_path=tmp_path / "step=4.ckpt"
    )
    assert_equal(module, expected)


def test_another_choice_after_the_switch_is_refused(tmp_path):
    data, kept = whole(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[two_phases(), kept], **EPOCHS).fit(Scheduled(), data)
    other = {"callbacks": [two_phases(unfreeze="net.3")], **EPOCHS}
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"unfreeze=\['net.3'\]\): it was \[\] when the second"):
        trainer(ldp.DPStrategy(**UNCHECKED), **other).fit(Scheduled(), data, ckpt_path=tmp_path / "step=3.ckpt")
    resumed = trainer(ldp.DPStrategy(**UNCHECKED), **other)
    resumed.fit(Scheduled(), data, ckpt_path=tmp_path / "step=2.ckpt")
    assert resumed.global_step == 5


# ---- privacy -----------------------------------------------------------------------------------------------------


def test_one_budget_one_noise_for_all_steps():
    data, seen = loader(n=20, batch_size=5), []

    class Noting(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            mechanism = trainer.strategy._run.mechanism
            seen.append((mechanism.noise_multiplier, mechanism.sample_rate, mechanism.expected_batch_size))

    dp = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    fit = trainer(dp, callbacks=[two_phases(1), Noting()], max_epochs=3, max_steps=-1)
    fit.fit(Scheduled(network(torch.float32)), data)
    noise = seen[0][0]
    assert seen == [(noise, 0.25, 5.0)] * 12
    accountant = PLDAccountant()
    step = dp_event.PoissonSampledDpEvent(0.25, dp_event.GaussianDpEvent(noise))
    accountant.compose(step, 12)
    assert accountant.get_epsilon(1e-3) == pytest.approx(dp.epsilon, rel=0.02)
    assert 2.9 < dp.epsilon <= 3.0
    without = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    trainer(without, max_epochs=3, max_steps=-1).fit(Scheduled(network(torch.float32)), data)
    assert (without.epsilon, without._run.mechanism.noise_multiplier) == (dp.epsilon, noise)


class CoupledLater(Regression):
    """From the switch on, samples meet."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        if not self.net[0].weight.requires_grad:
            out = out - out.mean(0)
        return (out - y).square().mean()


def test_what_is_trained_after_the_switch_is_checked_again():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.PrivacyError, match="depend"):
        trainer(dp, callbacks=[two_phases()], **EPOCHS).fit(CoupledLater(network()), whole())
    assert dp.num_releases == 2


class Manual(Regression):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization():
    module, data = Manual(network(), lr=0.5), whole()
    expected = expected_after(Regression(module.net, lr=0.5), data, 2, 3, 2.0)
    dp = ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, callbacks=[two_phases(learning_rate_factor=2.0)], **EPOCHS).fit(module, data)
    assert dp.num_releases == 5
    assert_equal(module, expected)


def test_the_loop_and_ordinary_training():
    module, data = Regression(network(), lr=0.5), whole()
    expected = expected_after(module, data, 2, 3, 2.0)
    loop, plain = copy.deepcopy(module), copy.deepcopy(module)
    private_fit(
        loop,
        data,
        5,
        {"clipping_engine": "loop", **UNCHECKED},
        callbacks=[two_phases(learning_rate_factor=2.0)],
        **EPOCHS,
    )
    assert_equal(loop, expected)
    trainer("auto", callbacks=[two_phases(learning_rate_factor=2.0)], **EPOCHS).fit(plain, data)
    weights = [name for name in expected if not is_bias(name)]
    after_two = copy.deepcopy(module)
    trainer("auto", max_epochs=2, max_steps=-1).fit(after_two, data)
    assert all(torch.allclose(plain.get_parameter(n), after_two.get_parameter(n), rtol=1e-12) for n in weights)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after_epoch": -1}, "after_epoch=-1: expected a number of epochs"),
        ({"after_epoch": 1.5}, "after_epoch=1.5: expected a number of epochs"),
        ({"after_epoch": True}, "after_epoch=True: expected a number of epochs"),
        ({"after_epoch": 1, "learning_rate_factor": 0}, "learning_rate_factor=0: expected a positive number"),
        ({"after_epoch": 1, "learning_rate_factor": math.inf}, "learning_rate_factor=inf: expected a positive"),
        ({"learning_rate_factor": 2}, "learning_rate_factor=2 with after_epoch=0"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ldp.PrivacyConfigurationError, match=message):
        ldp.BiasOnlyFinetuning(**arguments)


def test_a_first_phase_in_which_all_weights_are_frozen():
    module = Regression(nn.Sequential(nn.Linear(3, 2)))
    module.net[0].weight.requires_grad_(False)
    with pytest.raises(
        ldp.PrivacyConfigurationError, match="none of the 1 parameters that are frozen after that epoch"
    ):
        trainer(callbacks=[two_phases()], **EPOCHS).fit(module, loader())
