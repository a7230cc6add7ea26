"""Noise and batch size that change over a run: sampler, noise, ledger and budget follow the same schedule."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_dp as ldp
from lightning_dp.errors import PrivacyError
from lightning_dp.schedule import Schedule
from lightning_dp.strategies.terms import Terms
from tests.accounting import oracles
from tests.models import Regression, ZeroGradient, loader, trainer

STAGES = (ldp.Stage(3, noise_factor=2.0), ldp.Stage(4, batch_size_factor=0.5), ldp.Stage(2, 0.5, 2.0))
"""From noise 1 and rate 0.25: (2, 0.25) three times, (1, 0.125) four times, (0.5, 0.5) from then on."""
KINDS = [(0.25, 2.0, 3), (0.125, 1.0, 4), (0.5, 0.5, 5)]


def schedule(noise=1.0, **settings):
    return ldp.DPStrategy(noise_multiplier=noise, target_delta=1e-3, schedule=STAGES, **settings)


def counted(strategy):
    return [(p.sample_rate, p.noise_multiplier, p.num_releases) for p in strategy._run.ledger.phases]


class Steps(pl.Callback):
    """Notes every released gradient, and how many examples were drawn for it."""

    def __init__(self):
        self.gradients, self.sizes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(trainer.train_dataloader._delivered.num_real)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


def deviations(gradients):
    return [float(gradient.double().std()) for gradient in gradients]


def test_ledger_and_epsilon_are_those_of_the_stages():
    dp = schedule()
    trainer(dp, max_steps=12).fit(Regression(), loader())
    assert counted(dp) == KINDS
    pld = oracles.pld_epsilon(KINDS, 1e-3)
    assert pld <= dp.epsilon <= 1.02 * pld


def test_noise_and_rate_follow_the_stages():
    """Noise alone, 20,000 coordinates: std = factor * max_grad_norm / expected batch, which is 5 times its factor."""
    steps = Steps()
    fit = trainer(schedule(max_physical_batch_size=400), max_steps=9, callbacks=[steps])
    fit.fit(ZeroGradient(nn.Linear(3, 5000)), loader(n=400, batch_size=100))
    expected = [2.0 / 100] * 3 + [1.0 / 50] * 4 + [0.5 / 200] * 2
    torch.testing.assert_close(torch.tensor(deviations(steps.gradients)), torch.tensor(expected), rtol=0.03, atol=0)
    for size, mean in zip(steps.sizes, [100] * 3 + [50] * 4 + [200] * 2, strict=True):
        assert abs(size - mean) < 5 * (mean * (1 - mean / 400)) ** 0.5  # 5 standard deviations of Poisson sampling


def test_calibration_counts_the_whole_schedule():
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3, schedule=STAGES)
    trainer(dp, max_steps=12).fit(Regression(), loader())
    base = dp._run.schedule.base.noise_multiplier
    kinds = [(rate, base * noise, count) for rate, noise, count in KINDS]
    assert counted(dp) == [pytest.approx(kind) for kind in kinds]
    assert oracles.pld_epsilon(kinds, 1e-3) <= dp.epsilon <= 2.0
    assert dp.epsilon > 0.99 * 2.0


def test_the_budget_ends_in_the_middle_of_a_stage():
    """Just as much as eight steps cost, by dp-accounting and one per cent: the ninth does not fit."""
    eight, nine = (oracles.pld_epsilon([*KINDS[:2], (0.5, 0.5, n)], 1e-3) for n in (1, 2))
    assert nine > 1.02 * eight
    dp = schedule(target_epsilon=1.01 * eight)
    fit = trainer(dp, max_steps=100, callbacks=[ldp.PrivacyBudgetStopping()])
    fit.fit(Regression(), loader())
    assert (fit.global_step, dp.num_releases, dp.budget.releases_left) == (8, 8, 0)
    again = schedule(target_epsilon=1.01 * eight)
    with pytest.raises(ldp.PrivacyBudgetExceeded, match="8 releases have spent"):
        trainer(again, max_steps=100).fit(Regression(), loader())


def test_a_resumed_run_goes_on_in_its_stage(tmp_path):
    first = trainer(schedule(), max_steps=5)
    first.fit(Regression(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    dp = schedule()
    trainer(dp, max_steps=12).fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert counted(dp) == KINDS
    assert dp.noise_multiplier == 0.5
    assert dp.sample_rate == 0.5


def test_skipped_batches_leave_the_schedule_in_step():
    """An epoch is cut short after two of its four batches: what is released is what was drawn, step by step."""

    class CutsShort(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    dp = schedule(target_epsilon=1e6)
    fit = trainer(dp, max_steps=12)
    fit.fit(CutsShort(), loader())
    assert counted(dp) == KINDS
    assert dp.budget.step == 12


def test_a_budget_counts_from_any_step():
    dp = schedule(target_epsilon=50.0)
    trainer(dp, max_steps=1).fit(Regression(), loader())
    budget = dp.budget
    budget.check_next(7)  # a draw of a later step than the next one
    assert budget.step == 7
    budget.book(7)
    assert counted(dp) == [(0.25, 2.0, 1), (0.5, 0.5, 1)]
    assert budget.releases_left == budget._further_releases() - 1


def test_a_draw_of_another_rate_is_not_released():
    dp = schedule()
    trainer(dp, max_steps=1).fit(Regression(), loader())
    run = dp._run
    list(zip(run.loader, range(1), strict=False))
    drawn, _ = run.loader.take()
    run._schedule = Schedule(run.schedule.base)
    assert run.mechanism_of(drawn) == run.schedule.base
    run._schedule = Schedule(run.schedule.base.scaled(1, 0.5))
    with pytest.raises(PrivacyError, match=r"drawn with sample rate 0.25 and would be accounted with 0.125"):
        run.mechanism_of(drawn)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_bad_number_of_steps(value):
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"num_steps=.* of a stage: expected an integer >= 1"):
        ldp.Stage(value)


@pytest.mark.parametrize("name", ["noise_factor", "batch_size_factor"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_bad_factors(name, value):
    with pytest.raises(ldp.PrivacyConfigurationError, match=rf"{name}=.* of a stage: expected a finite number > 0"):
        ldp.Stage(3, **{name: value})


def test_a_stage_cannot_sample_above_one():
    dp = ldp.DPStrategy(noise_multiplier=1.0, schedule=[ldp.Stage(2), ldp.Stage(2, batch_size_factor=5)])
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"batch_size_factor=5 .*would be 1.25.*Use at most 4"):
        trainer(dp).fit(Regression(), loader())


def test_bad_arguments():
    with pytest.raises(ldp.PrivacyConfigurationError, match="schedule: 3 is one of its stages, expected a Stage"):
        ldp.DPStrategy(noise_multiplier=1.0, schedule=[3])
    with pytest.raises(ldp.PrivacyConfigurationError, match="changed_settings='ask': expected 'refuse' or 'new_phase'"):
        ldp.DPStrategy(noise_multiplier=1.0, changed_settings="ask")


# ---- changed settings ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3), max_steps=3)
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


CHANGES = [
    ({}, {"n": 40, "batch_size": 10}, "the size of the training data is now 40 and was 20, in the 3 releases"),
    ({}, {"batch_size": 10}, "the sample rate is now 0.5 and was 0.25"),
    ({"target_delta": 1e-2}, {}, "target_delta is now 0.01 and was 0.001"),
    ({"noise_multiplier": 2.0}, {}, "noise_multiplier is now 2 and was 1"),
    ({"schedule": STAGES}, {}, "the schedule is another"),
]


@pytest.mark.parametrize(("settings", "data", "words"), CHANGES)
def test_a_change_is_refused_or_accounted_as_the_user_says(checkpoint, settings, data, words):
    arguments = {"noise_multiplier": 1.0, "target_delta": 1e-3} | settings
    with pytest.raises(ldp.PrivacyConfigurationError, match=words):
        trainer(ldp.DPStrategy(**arguments), max_steps=5).fit(Regression(), loader(**data), ckpt_path=checkpoint)
    dp = ldp.DPStrategy(**arguments, changed_settings="new_phase")
    trainer(dp, max_steps=5).fit(Regression(), loader(**data), ckpt_path=checkpoint)
    assert dp.num_releases == 5
    pld = oracles.pld_epsilon(counted(dp), dp.delta)
    assert pld <= dp.epsilon <= 1.02 * pld
    assert sum(count for _, noise, count in counted(dp) if noise == 1.0) >= 3


def test_a_new_phase_is_calibrated_to_what_is_left(checkpoint):
    dp = ldp.DPStrategy(target_epsilon=5.0, target_delta=1e-3, changed_settings="new_phase")
    trainer(dp, max_steps=9).fit(Regression(), loader(batch_size=10), ckpt_path=checkpoint)
    first, second = counted(dp)
    assert first == (0.25, 1.0, 3)
    assert (second[0], second[2]) == (0.5, 6)
    assert oracles.pld_epsilon([first, second], 1e-3) <= dp.epsilon <= 5.0
    assert dp.epsilon > 0.99 * 5.0


def test_a_budget_that_earlier_releases_have_spent_cannot_be_calibrated(checkpoint):
    dp = ldp.DPStrategy(target_epsilon=0.5, target_delta=1e-3, changed_settings="new_phase")
    with pytest.raises(ldp.PrivacyBudgetExceeded, match=r"target_epsilon=0.5: earlier releases alone have spent"):
        trainer(dp, max_steps=9).fit(Regression(), loader(batch_size=10), ckpt_path=checkpoint)


def test_a_second_fit_on_other_data_is_another_phase():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fit = trainer(dp, max_steps=2)
    fit.fit(Regression(), loader())
    fit.fit_loop.epoch_loop.max_steps = 4
    with pytest.raises(ldp.PrivacyConfigurationError, match="the size of the training data is now 40 and was 20"):
        fit.fit(Regression(), loader(n=40))
    assert dp.num_releases == 2


def test_a_larger_batch_of_a_reloaded_dataloader_is_another_phase():
    class Grows(Regression):
        def train_dataloader(self):
            return loader(batch_size=5 * (1 + self.current_epoch))

    with pytest.raises(ldp.PrivacyConfigurationError, match="the sample rate is now 0.5 and was 0.25"):
        trainer(max_steps=6, reload_dataloaders_every_n_epochs=1).fit(Grows())
    dp = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    trainer(dp, max_steps=6, reload_dataloaders_every_n_epochs=1).fit(Grows())
    assert counted(dp) == [(0.25, 1.0, 4), (0.5, 1.0, 2)]


def test_parameters_frozen_in_the_middle_are_one_run():
    """All parameters, then biases only: one budget, one noise, one ledger."""

    class Freezes(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net.weight.requires_grad_(trainer.current_epoch == 0)

    dp = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    module = Regression()
    trainer(dp, max_epochs=2, max_steps=-1, callbacks=[Freezes()]).fit(module, loader())
    assert counted(dp) == [(0.25, dp.noise_multiplier, 8)]
    assert 2.97 < dp.epsilon <= 3.0


@pytest.mark.parametrize("state", [None, {}, {"schedule": [{"num_steps": 0}]}, {"schedule": [], "extra": 1}])
def test_malformed_terms(state):
    with pytest.raises(PrivacyError, match="the terms of the fit in this checkpoint cannot be read"):
        Terms.from_state(state)


def test_without_a_schedule_a_skipped_batch_costs_no_search(monkeypatch):
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=50.0, target_delta=1e-3)
    trainer(dp, max_steps=1).fit(Regression(), loader())
    monkeypatch.setattr(type(dp.budget), "_further_releases", lambda self: pytest.fail("searched"))
    left = dp.budget.releases_left
    dp.budget.book(40)
    assert dp.budget.releases_left == left - 1
    assert counted(dp) == [(0.25, 1.0, 2)]


def test_the_summary_and_the_first_line_tell_of_the_stages(capsys, caplog):
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3, schedule=STAGES)
    with caplog.at_level("INFO"):
        trainer(dp, max_steps=12, callbacks=[ldp.PrivacyMonitor()]).fit(Regression(), loader())
    assert "for 12 steps at sample rate 0.25, both varied in 3 stages." in caplog.text
    shown, base = capsys.readouterr().out, dp._run.schedule.base.noise_multiplier
    assert "the noise and sample rate of every release were fixed before the first one" in " ".join(shown.split())
    for line in (f"3 × {2 * base:.4g} at 0.25", f"4 × {base:.4g} at 0.125", f"5 × {base / 2:.4g} at 0.5"):
        assert line in shown


def test_a_plan_counts_the_schedule(capsys):
    dp = schedule()
    found = ldp.plan(trainer(dp, max_steps=12), Regression(), loader()).forecast
    for count, kinds in ((3, KINDS[:1]), (7, KINDS[:2]), (12, KINDS)):
        pld = oracles.pld_epsilon(kinds, 1e-3)
        assert pld <= found.epsilon_after(count) <= 1.02 * pld
    assert found.epsilon == found.epsilon_after(12)
    assert (found.batches, found.noise_for) == ((), ())
    assert "Noise and batch size follow a schedule: no other is shown." in capsys.readouterr().out


def test_a_stage_may_take_all_examples():
    """49 * (1 / 49) is not quite 1."""
    dp = ldp.DPStrategy(noise_multiplier=5.0, target_delta=1e-3, schedule=[ldp.Stage(1), ldp.Stage(1, 1.0, 49.0)])
    trainer(dp, max_steps=2).fit(Regression(), loader(n=49, batch_size=1))
    assert counted(dp) == [(1 / 49, 5.0, 1), (1.0, 5.0, 1)]
