"""Checkpoints: ordinary ones, with the ledger in them; nothing released is ever forgotten."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dp as ldp
from lightning_dp.reporting import read_report
from tests.models import Regression, loader, trainer


def saved(path, steps=3, **settings):
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, **settings), max_steps=steps)
    fit.fit(Regression(), loader())
    fit.save_checkpoint(path)
    return fit


def test_a_checkpoint_is_an_ordinary_one(tmp_path):
    path = tmp_path / "a.ckpt"
    fit = saved(path)
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"net.weight", "net.bias"}
    module = Regression.load_from_checkpoint(path)
    assert torch.equal(module.net.weight, fit.lightning_module.net.weight)
    plain = Regression()
    trainer("auto").validate(plain, loader(shuffle=False), ckpt_path=path, verbose=False)


def test_weights_only_checkpoints_hold_the_ledger_too(tmp_path):
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=2)
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert json.dumps(torch.load(tmp_path / "w.ckpt", weights_only=True)["lightning_dp"])


def test_resume_goes_on_counting(tmp_path):
    saved(tmp_path / "a.ckpt")
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    fit = trainer(dp, max_steps=5)
    fit.fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert (fit.global_step, dp.num_releases) == (5, 5)
    assert dp.epsilon == ldp.compute_epsilon(noise_multiplier=1.0, sample_rate=0.25, num_steps=5, delta=1e-3)


def test_resume_keeps_the_calibrated_noise(tmp_path):
    first = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    fit = trainer(first, max_steps=20, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)])
    fit.fit(Regression(), loader())
    for path in tmp_path.glob("privacy-journal-*.json"):
        path.unlink()
    checkpoint = next(tmp_path.glob("*step=7.ckpt"))
    dp = ldp.DPStrategy(target_epsilon=3.0, target_delta=1e-3)
    again = trainer(dp, max_steps=10_000, callbacks=[ldp.PrivacyBudgetStopping()])
    again.fit(Regression(), loader(), ckpt_path=checkpoint)
    assert dp.noise_multiplier == first.noise_multiplier
    assert dp.num_releases == 20
    assert dp.epsilon <= 3.0


def test_resume_with_the_budget_spent_makes_no_step(tmp_path):
    settings = {"noise_multiplier": 1.0, "target_epsilon": 8.0, "target_delta": 1e-3}
    fit = trainer(ldp.DPStrategy(**settings), max_steps=10_000, callbacks=[ldp.PrivacyBudgetStopping()])
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    dp = ldp.DPStrategy(**settings)
    again = trainer(dp, max_steps=10_000, min_epochs=1000, callbacks=[ldp.PrivacyBudgetStopping()])
    again.fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == fit.global_step
    assert dp.num_releases == fit.strategy.num_releases


def test_an_older_checkpoint_does_not_forget_later_releases(tmp_path):
    fit = trainer(
        ldp.DPStrategy(noise_multiplier=1.0),
        max_steps=10,
        callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)],
    )
    fit.fit(Regression(), loader())
    older = next(tmp_path.glob("*step=2.ckpt"))
    fit.fit_loop.epoch_loop.max_steps = 4
    fit.fit(Regression(), loader(), ckpt_path=older)
    assert (fit.global_step, fit.strategy.num_releases) == (4, 12)
    fresh = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(fresh, max_steps=4).fit(Regression(), loader(), ckpt_path=older)
    assert fresh.num_releases == 14  # all ten, the two of the first resume, and its own two


@pytest.mark.parametrize("way", ["copy", "link"])
def test_a_copy_of_an_older_checkpoint_does_not_forget_later_releases(tmp_path, way):
    """Such as of the best one, which is then refined; that the run ended as it should leaves its journal only."""
    original, elsewhere = tmp_path / "original", tmp_path / "elsewhere"
    first = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    fit = trainer(first, max_steps=10, callbacks=[ModelCheckpoint(original, every_n_train_steps=3, save_top_k=-1)])
    fit.fit(Regression(), loader())
    (path,) = original.glob("*step=3.ckpt")
    elsewhere.mkdir()
    if way == "copy":
        shutil.copy(path, elsewhere / "a.ckpt")
    else:
        saved_there = torch.load(path)
        del saved_there["lightning_dp"]["directory"]  # the link alone leads there
        torch.save(saved_there, path)
        (elsewhere / "a.ckpt").symlink_to(path)
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer(dp, max_steps=5).fit(Regression(), loader(), ckpt_path=elsewhere / "a.ckpt")
    assert dp.num_releases == 12
    assert read_report(elsewhere / "a.ckpt").privacy.num_releases == 12  # by the journal of the second run


def test_a_copy_whose_original_is_gone_knows_its_own_releases(tmp_path):
    original, elsewhere = tmp_path / "original", tmp_path / "elsewhere"
    original.mkdir()
    saved(original / "a.ckpt")
    original.rename(elsewhere)
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer(dp, max_steps=5).fit(Regression(), loader(), ckpt_path=elsewhere / "a.ckpt")
    assert dp.num_releases == 5


def test_loading_for_a_test_counts_nothing(tmp_path):
    saved(tmp_path / "a.ckpt")
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(dp).test(Regression(), loader(shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert dp.num_releases == 0


def test_another_sample_rate_is_refused_or_accounted_as_another_phase(tmp_path):
    fit = trainer(ldp.DPStrategy(target_epsilon=3.0), max_steps=4)
    fit.fit(Regression(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match="sample rate is now 0.5 and was 0.25"):
        trainer(ldp.DPStrategy(target_epsilon=3.0), max_steps=4).fit(
            Regression(), loader(batch_size=10), ckpt_path=tmp_path / "a.ckpt"
        )
    dp = ldp.DPStrategy(noise_multiplier=2.0, changed_settings="new_phase")
    trainer(dp, max_steps=6).fit(Regression(), loader(batch_size=10), ckpt_path=tmp_path / "a.ckpt")
    assert dp.num_releases == 6


def test_what_a_resumed_run_released_is_found_by_the_next_one(tmp_path):
    saved(tmp_path / "a.ckpt", steps=2)
    resumed = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(resumed, max_steps=9).fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")  # saves no checkpoint
    assert resumed.num_releases == 9
    again = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(again, max_steps=3).fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.num_releases == 10


def test_a_checkpoint_without_a_ledger_is_said_to_be_one(tmp_path, caplog):
    plain = trainer("auto", max_steps=2)
    plain.fit(Regression(), loader())
    plain.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_steps=3).fit(Regression(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert "holds no record of releases" in caplog.text
