"""Data sets that have nobody in common: the greatest of their epsilons counts, each by dp-accounting.

Where that takes long, every step is on the whole data set: then the exact epsilon has a formula, which is written down
here a second time (Balle and Wang 2018, theorem 8; k releases with noise z tell as much as one with z / sqrt(k)).
"""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch.utils.data import DataLoader, random_split

import lightning_dp as ldp
from lightning_dp.errors import PrivacyError
from tests.accounting import oracles
from tests.models import Regression, loader, trainer

DELTA = 1e-3


def part(partition, n=20, batch_size=None):
    data = loader(n=n).dataset
    return DataLoader(ldp.PrivateDataset(data, partition=partition), batch_size=batch_size or n, shuffle=True)


def strategy(noise_multiplier=1.0, **settings):
    return ldp.DPStrategy(**{"noise_multiplier": noise_multiplier, "target_delta": DELTA} | settings)


class Fits:
    """One run in several fits."""

    def __init__(self, dp, **settings):
        self.dp, self.module = dp, Regression()
        self.trainer = trainer(dp, max_steps=0, **settings)

    def on(self, data, steps, start=None, **arguments):
        self.trainer.should_stop = False
        self.trainer.fit_loop.epoch_loop.max_steps = (self.trainer.global_step if start is None else start) + steps
        self.trainer.fit(self.module, data, **arguments)
        return self


def undeclared(n=20, batch_size=None):
    return loader(n=n, batch_size=batch_size or n)


def exact(count, noise=1.0):
    """The epsilon of so many releases about everybody."""
    mu = math.sqrt(count) / noise

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - DELTA

    return brentq(excess, 0, 100)


def assert_epsilon(dp, expected):
    assert expected <= dp.epsilon <= 1.02 * expected


def spent(dp):
    return [(r.partition, r.num_units, r.sample_rate, n) for r, n in dp._run.ledger.counts.items()]


def test_the_greatest_epsilon_counts():
    dp = strategy()
    Fits(dp).on(part("a", batch_size=5), 3).on(part("b", batch_size=10), 2)
    assert spent(dp) == [("a", 20, 0.25, 3), ("b", 20, 0.5, 2)]
    of_a, of_b = [(0.25, 1.0, 3)], [(0.5, 1.0, 2)]
    each = [oracles.pld_epsilon(releases, DELTA) for releases in (of_a, of_b)]
    assert max(each) < 0.9 * oracles.pld_epsilon(of_a + of_b, DELTA)
    assert_epsilon(dp, max(each))


def test_steps_on_one_partition_add_up():
    dp = strategy()
    Fits(dp).on(part("a"), 3).on(part("b"), 4).on(part("a"), 2)
    assert spent(dp) == [("a", 20, 1.0, 5), ("b", 20, 1.0, 4)]
    assert_epsilon(dp, exact(5))


@pytest.mark.parametrize("first", ["named", "undeclared"])
def test_an_undeclared_data_set_may_have_anybody(first):
    """It is added to both; and only going to it is a change, that has to be said."""
    dp = strategy(changed_settings="new_phase")
    named, others = [(part("a"), 3), (part("b"), 4)], [(undeclared(), 5)]
    fits = Fits(dp)
    for data, steps in named + others if first == "named" else others + named:
        fits.on(data, steps)
    assert_epsilon(dp, exact(4 + 5))


def test_leaving_the_partitions_is_a_change_and_coming_to_one_is_not():
    dp = strategy()
    fits = Fits(dp).on(undeclared(), 2).on(part("a"), 2)  # by its name it is said to be another
    fits.on(undeclared(), 2)  # as before
    assert spent(dp) == [(None, 20, 1.0, 4), ("a", 20, 1.0, 2)]
    dp = strategy()
    fits = Fits(dp).on(part("a"), 2)
    with pytest.raises(ldp.PrivacyConfigurationError, match="partition of the training data is now None and was 'a'"):
        fits.on(undeclared(), 2)


def test_one_partition_spends_its_budget_and_the_other_still_has_it():
    """Just as much as eight steps cost, and one per cent."""
    target = 1.01 * exact(8)
    assert target < exact(9)
    dp = strategy(target_epsilon=target)
    fits = Fits(dp, callbacks=[ldp.PrivacyBudgetStopping()])
    fits.on(part("a"), 100)
    assert (dp.num_releases, dp.budget.releases_left) == (8, 0)
    fits.trainer.callbacks.clear()
    fits.on(part("b"), 3)
    assert (dp.num_releases, dp.budget.releases_left) == (11, 5)
    assert_epsilon(dp, exact(8))
    with pytest.raises(ldp.PrivacyBudgetExceeded, match="11 releases have spent"):
        fits.on(part("a"), 100)
    with pytest.raises(ldp.PrivacyBudgetExceeded, match="16 releases have spent"):
        fits.on(part("b"), 100)
    assert spent(dp) == [("a", 20, 1.0, 8), ("b", 20, 1.0, 8)]
    assert dp.epsilon <= target


def test_noise_is_calibrated_to_what_is_left_for_the_partition():
    dp = strategy(None, target_epsilon=2.0)
    fits = Fits(dp).on(part("a"), 8)
    of_a = dp.noise_multiplier
    assert 1.98 < dp.epsilon <= 2.0
    fits.on(part("b"), 30)
    of_b = dp.noise_multiplier
    assert 1.98 < exact(8, of_a) <= 2.0
    assert 1.98 < exact(30, of_b) <= 2.0
    assert 1.98 < dp.epsilon <= 2.0
    with pytest.raises(ldp.PrivacyBudgetExceeded):
        fits.on(part("a"), 1)
    assert dp.noise_multiplier == of_a


def test_going_back_compares_with_the_partition_itself(tmp_path):
    dp = strategy()
    fits = Fits(dp).on(part("a"), 2).on(part("b", n=40, batch_size=30), 2).on(part("a"), 2)
    assert spent(dp) == [("a", 20, 1.0, 4), ("b", 40, 0.75, 2)]
    fits.trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match="the size of the training data is now 30 and was 20"):
        fits.on(part("a", n=30), 2)
    for partition, was in (("a", 20), ("b", 40)):
        again = Fits(strategy())
        with pytest.raises(ldp.PrivacyConfigurationError, match=f"training data is now 30 and was {was}"):
            again.on(part(partition, n=30), 2, 6, ckpt_path=tmp_path / "a.ckpt")
    again = Fits(strategy()).on(part("b", n=40, batch_size=30), 2, 6, ckpt_path=tmp_path / "a.ckpt")
    assert spent(again.dp) == [("a", 20, 1.0, 4), ("b", 40, 0.75, 4)]
    assert_epsilon(again.dp, exact(4))  # everybody four times, which tells more than a sample


def test_a_checkpoint_of_one_partition_is_gone_on_with_on_another(tmp_path):
    first = Fits(strategy(None, target_epsilon=2.0)).on(part("a"), 6)
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    dp = strategy(None, target_epsilon=2.0)
    second = Fits(dp).on(part("b"), 6, 6, ckpt_path=tmp_path / "a.ckpt")
    assert spent(dp) == [("a", 20, 1.0, 6), ("b", 20, 1.0, 6)]
    assert 1.98 < dp.epsilon <= 2.0
    second.trainer.save_checkpoint(tmp_path / "b.ckpt")
    again = strategy(None, target_epsilon=2.0)
    with pytest.raises(ldp.PrivacyBudgetExceeded):
        Fits(again).on(part("a"), 1, 12, ckpt_path=tmp_path / "b.ckpt")
    assert again.noise_multiplier == first.dp.noise_multiplier


def test_terms_of_a_checkpoint_before_the_first_release_do_not_count(tmp_path):
    fits = Fits(strategy()).on(part("a"), 0)
    fits.trainer.save_checkpoint(tmp_path / "a.ckpt")
    dp = strategy()
    Fits(dp).on(part("a", n=40), 2, ckpt_path=tmp_path / "a.ckpt")
    assert spent(dp) == [("a", 40, 1.0, 2)]


@pytest.mark.parametrize("terms", [{"num_units": 3}, [3], [{"schedule": []}]])
def test_terms_that_cannot_be_read(tmp_path, terms):
    fits = Fits(strategy()).on(part("a"), 1)
    fits.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt")
    saved["lightning_dp"]["terms"] = terms
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(PrivacyError, match="the terms of the fit in this checkpoint cannot be read"):
        Fits(strategy()).on(part("a"), 1, ckpt_path=tmp_path / "b.ckpt")


def test_parts_of_one_partition_add_up():
    whole = ldp.PrivateDataset(loader(n=40).dataset, partition="a")
    dp = strategy()
    fits = Fits(dp)
    for half in random_split(whole, [20, 20]):
        fits.on(DataLoader(half, batch_size=20), 3)
    assert spent(dp) == [("a", 20, 1.0, 6)]
    assert_epsilon(dp, exact(6))


def test_a_default_delta_suits_every_partition():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fits = Fits(dp).on(part("a"), 2)
    assert dp.delta == 1 / 200
    fits.on(part("b", n=100), 2)
    assert dp.delta == 1 / 1000
    fits.on(part("c"), 2)
    assert dp.delta == 1 / 1000


def test_terms_outlive_a_checkpoint_that_knows_nothing_of_them(tmp_path):
    """Such as one of public training, from which a second fit begins."""
    run = trainer("auto", max_steps=1)
    run.fit(Regression(), loader())
    run.save_checkpoint(tmp_path / "public.ckpt")
    fits = Fits(strategy()).on(undeclared(), 2)
    with pytest.raises(ldp.PrivacyConfigurationError, match="the size of the training data is now 19 and was 20"):
        fits.on(undeclared(n=19), 2, ckpt_path=tmp_path / "public.ckpt")


def test_a_default_delta_suits_data_that_only_a_journal_tells_of(tmp_path):
    dp = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    fits = Fits(dp).on(undeclared(), 2)
    fits.trainer.save_checkpoint(tmp_path / "a.ckpt")
    fits.on(undeclared(n=100), 2)
    again = ldp.DPStrategy(noise_multiplier=1.0, changed_settings="new_phase")
    Fits(again).on(undeclared(), 1, 2, ckpt_path=tmp_path / "a.ckpt")
    assert spent(again) == [(None, 20, 1.0, 3), (None, 100, 1.0, 2)]
    assert again.delta == 1 / 1000


def test_partitions_that_take_turns_in_one_fit():
    class Turns(Regression):
        def train_dataloader(self):
            return part("ab"[self.current_epoch % 2], batch_size=10 * (1 + self.current_epoch % 2))

    dp = strategy()
    trainer(dp, max_steps=6, reload_dataloaders_every_n_epochs=1).fit(Turns())
    assert spent(dp) == [("a", 20, 0.5, 4), ("b", 20, 1.0, 2)]
    assert exact(2) <= dp.epsilon < exact(4)


def test_users_have_partitions_too():
    ids = [user for user in range(10) for _ in range(2)]
    dp = strategy()
    fits = Fits(dp)
    for name in ("a", "b"):
        data = ldp.PrivateDataset(loader().dataset, user_ids=ids, examples_per_user=2, partition=name)
        fits.on(DataLoader(data, batch_size=20), 3)
    assert spent(dp) == [("a", 10, 1.0, 3), ("b", 10, 1.0, 3)]
    assert_epsilon(dp, exact(3))


def test_a_default_delta_that_shrank_is_no_change():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fits = Fits(dp)
    for data in (part("a"), part("b", n=100), part("a")):
        fits.on(data, 1)
    assert dp.delta == pytest.approx(1e-3)
    assert dp.num_releases == 3
