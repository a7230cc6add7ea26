"""The budget holds whatever the trainer, the callbacks or the user do."""

import pytest
import torch

import lightning_dp as ldp
from tests.models import Regression, ZeroGradient, loader, trainer

ROUND = {"noise_multiplier": 1.0, "target_epsilon": 8.3, "target_delta": 1e-3}  # loader(): q = 1/4


def allowed(**changes):
    settings = {**ROUND, **changes}
    return ldp.max_steps(sample_rate=0.25, **settings)


def strategy(**changes):
    return ldp.DPStrategy(**{**ROUND, **changes})


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": -1, "max_steps": -1},
        {"max_epochs": 1000, "max_steps": -1},
        {"max_steps": 10_000, "min_steps": 1000},
        {"max_epochs": 1000, "max_steps": -1, "min_epochs": 500},
    ],
)
def test_stops_cleanly_at_the_last_step_that_fits(limits):
    dp = strategy()
    fit = trainer(dp, callbacks=[ldp.PrivacyBudgetStopping()], **limits)
    fit.fit(ZeroGradient(), loader())
    assert fit.state.finished
    assert dp.num_releases == fit.global_step == allowed()
    assert dp.num_releases % 4 != 0  # in the middle of an epoch
    assert dp.epsilon <= 8.3
    assert fit.fit_loop.min_epochs == limits.get("min_epochs", int("min_steps" in limits))
    assert fit.fit_loop.min_steps == limits.get("min_steps")


@pytest.mark.parametrize("limits", [{}, {"min_epochs": 500}, {"max_epochs": -1}])
def test_without_the_callback_an_error_comes_before_the_step(limits):
    dp, module = strategy(), ZeroGradient()
    fit = trainer(dp, max_steps=-1, **{"max_epochs": 1000, **limits})
    with pytest.raises(ldp.PrivacyBudgetExceeded, match=r"target_epsilon=8.3.*releases"):
        fit.fit(module, loader())
    assert dp.num_releases == fit.global_step == allowed()
    assert dp.epsilon <= 8.3


def test_a_second_fit_finds_the_budget_spent():
    dp, module = strategy(), ZeroGradient()
    fit = trainer(dp, max_steps=10_000, callbacks=[ldp.PrivacyBudgetStopping()])
    fit.fit(module, loader())
    before = {n: p.clone() for n, p in module.state_dict().items()}
    fit.fit(module, loader())
    assert (fit.global_step, dp.num_releases) == (allowed(), allowed())
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    fit.callbacks.clear()
    fit.should_stop = False  # older Lightning keeps it
    with pytest.raises(ldp.PrivacyBudgetExceeded):
        fit.fit(module, loader())
    assert dp.num_releases == allowed()


def test_one_trainer_fits_twice():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fit, module = trainer(dp, max_steps=3), Regression()
    fit.fit(module, loader())
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(module, loader())
    assert (fit.global_step, dp.num_releases) == (5, 5)
    assert dp.epsilon == ldp.compute_epsilon(noise_multiplier=1.0, sample_rate=0.25, num_steps=5, delta=1 / 200)


def test_calibrated_noise_spends_the_target_at_the_planned_end():
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    trainer(dp, max_epochs=5, max_steps=-1).fit(Regression(), loader())
    assert dp.num_releases == 20
    assert 2.0 * 0.995 <= dp.epsilon <= 2.0


def test_delta_defaults_to_a_tenth_of_one_over_n():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    assert dp.delta is None
    trainer(dp).fit(Regression(), loader(n=50))
    assert dp.delta == pytest.approx(1 / 500)


def test_public_properties_before_and_after():
    dp = ldp.DPStrategy(target_epsilon=2.0)
    assert (dp.epsilon, dp.num_releases, dp.noise_multiplier, dp.sample_rate) == (0.0, 0, None, None)
    with pytest.raises(ldp.PrivacyError, match="once a fit has seen its training data"):
        dp.budget  # noqa: B018
    trainer(dp).fit(Regression(), loader())
    assert dp.sample_rate == 0.25
    assert dp.noise_multiplier > 0


def test_no_noise_is_infinite_epsilon_said_loudly(caplog):
    dp = ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, callbacks=[ldp.PrivacyMonitor()]).fit(Regression(), loader())
    assert dp.epsilon == float("inf")
    assert "NOT private" in caplog.text


def test_the_optimizer_cannot_be_stepped_around_the_release():
    class Around(Regression):
        def training_step(self, batch, batch_idx):
            self.optimizers(use_pl_optimizer=False).step()
            return super().training_step(batch, batch_idx)

    module = Around()
    before = {n: p.clone() for n, p in module.state_dict().items()}
    dp = ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, max_steps=1).fit(module, loader(batch_size=20))
    plain = Regression()
    plain.load_state_dict(before)
    trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=1).fit(plain, loader(batch_size=20))
    assert all(torch.allclose(p, module.state_dict()[n]) for n, p in plain.state_dict().items())


def test_a_skipped_optimizer_step_is_refused():
    class Skips(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()

    with pytest.raises(ldp.PrivacyError, match="never released"):
        trainer().fit(Skips(), loader())


def test_a_closure_run_twice_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    with pytest.raises(ldp.PrivacyError, match="one draw of examples"):
        trainer().fit(Regression(optimizer=Twice), loader())


def test_empty_draws_are_released_and_counted():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    module = Regression()
    trainer(dp, max_steps=30).fit(module, loader(n=1000, batch_size=1))
    assert dp.num_releases == 30  # each draw is empty with probability 0.37
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # which Lightning says once in a process
def test_a_training_step_that_returns_none_still_counts():
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    dp = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(dp, max_steps=4).fit(Skips(), loader())
    assert dp.num_releases == 4


def test_a_second_step_on_one_batch_is_refused():
    class Again(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            optimizer.step(closure=lambda: None)

    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.PrivacyError, match="nothing to release"):
        trainer(dp).fit(Again(), loader())
    assert dp.num_releases == 1


def test_the_optimizer_does_not_see_the_loss():
    seen = []

    class Polyak(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(closure())
            return super().step()

    trainer().fit(Regression(optimizer=Polyak), loader())
    assert seen == [None] * 3


def test_the_default_delta_suits_every_dataset_of_a_run():
    dp = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    fit, module = trainer(dp, max_steps=1), Regression()
    fit.fit(module, loader(n=1000))
    fit.fit_loop.epoch_loop.max_steps = 2
    fit.fit(module, loader(n=20))
    assert dp.delta == pytest.approx(1e-4)
