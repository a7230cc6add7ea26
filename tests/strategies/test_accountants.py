"""Accountants in a fit: each keeps the target, the default one is checked by a second library."""

import logging

import pytest

import lightning_dp as ldp
from lightning_dp.accounting import PRVAccountant, RDPAccountant, RDPFilter
from lightning_dp.reporting import read_report
from tests.accounting import oracles
from tests.models import Regression, loader, trainer


def counted(strategy):
    return [(p.sample_rate, p.noise_multiplier, p.num_releases) for p in strategy._run.ledger.phases]


def fit(dp, steps=8, ckpt_path=None, **data):
    run = trainer(dp, max_steps=steps, callbacks=[ldp.PrivacyBudgetStopping()])
    run.fit(Regression(), loader(**data), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp", "rdp_filter", RDPAccountant()])
def test_every_accountant_keeps_the_target(accountant):
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant=accountant)
    fit(dp)
    assert dp.num_releases == 8
    assert 0.99 * 2.0 <= dp.epsilon <= 2.0
    assert oracles.pld_epsilon(counted(dp), 1e-3) <= dp.epsilon


def test_more_than_the_best_bound_costs_noise():
    noise = {}
    for accountant in ("prv", "pld", "rdp", "rdp_filter"):
        dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant=accountant)
        fit(dp, steps=1)
        noise[accountant] = dp.noise_multiplier
    assert noise["pld"] == pytest.approx(noise["prv"], rel=0.01)
    assert noise["prv"] < noise["rdp"] <= noise["rdp_filter"]


@pytest.fixture
def too_low(monkeypatch):
    """The default accountant is ten per cent too low."""
    right = PRVAccountant._epsilon
    monkeypatch.setattr(PRVAccountant, "_epsilon", lambda self, *args: 0.9 * right(self, *args))


def test_a_bound_that_is_none_is_found_out_before_the_first_step(too_low, caplog):
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    with caplog.at_level(logging.WARNING, "lightning_dp"):
        fit(dp)
    assert "Two accountants disagree" in caplog.text
    assert dp.num_releases == 8
    assert oracles.pld_epsilon(counted(dp), 1e-3) <= dp.epsilon <= 2.0


def test_the_budget_ends_where_the_second_accountant_says(too_low):
    dp = ldp.DPStrategy(target_epsilon=2.0, noise_multiplier=2.0, target_delta=1e-3)
    run = fit(dp, steps=1000)
    (kind,) = counted(dp)
    assert run.global_step == kind[2]
    assert oracles.pld_epsilon([kind], 1e-3) <= dp.epsilon <= 2.0
    assert oracles.pld_epsilon([(*kind[:2], kind[2] + 1)], 1e-3) > 2.0 * 0.99


def test_the_larger_value_is_reported(too_low):
    dp = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3)
    fit(dp)
    assert dp.epsilon >= oracles.pld_epsilon(counted(dp), 1e-3) * (1 - 1e-6)


# ---- a filter: what comes next may depend on results -----------------------------------------------------------------


def filtered(**settings):
    return ldp.DPStrategy(
        **{"target_epsilon": 3.0, "target_delta": 1e-3, "accountant": "rdp_filter", "changed_settings": "new_phase"}
        | settings
    )


def test_phases_chosen_by_results_stay_within_the_target(tmp_path):
    first = filtered(noise_multiplier=3.0)
    run = fit(first, steps=4)
    run.save_checkpoint(tmp_path / "a.ckpt")
    dp = filtered(noise_multiplier=2.0)  # as if the results had asked for it
    fit(dp, steps=1000, ckpt_path=tmp_path / "a.ckpt", batch_size=10)
    before, after = counted(dp)
    assert before == (0.25, 3.0, 4)
    assert after[:2] == (0.5, 2.0)
    assert dp.budget.releases_left == 0
    assert oracles.pld_epsilon([before, after], 1e-3) < dp.epsilon <= 3.0
    with pytest.raises(ldp.PrivacyBudgetExceeded):
        trainer(filtered(noise_multiplier=2.0), max_steps=10**6).fit(
            Regression(), loader(batch_size=10), ckpt_path=tmp_path / "a.ckpt"
        )


def test_the_target_of_a_filter_is_fixed(tmp_path):
    run = fit(filtered(), steps=2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for settings in ({"target_epsilon": 4.0}, {"accountant": "prv"}):
        with pytest.raises(ldp.PrivacyConfigurationError, match=r"was 3.0 in the 2 releases made before: a filter"):
            fit(filtered(**settings), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("settings", "n"),
    [({"accountant": RDPFilter(4.0)}, 20), ({"target_delta": 1e-4}, 20), ({"target_delta": None}, 40)],
    ids=["given", "by another delta", "by the default delta of other data"],
)
def test_the_order_of_a_filter_is_fixed(tmp_path, settings, n):
    run = fit(filtered(target_delta=None), steps=2)
    order = run.strategy.budget.accountant.order
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match=f"was {order} in the 2 releases made before: a filter"):
        fit(filtered(**settings, noise_multiplier=9.0), ckpt_path=tmp_path / "a.ckpt", n=n)
    dp = filtered(**settings | {"accountant": RDPFilter(order)}, noise_multiplier=9.0)  # the way out
    fit(dp, steps=3, ckpt_path=tmp_path / "a.ckpt", n=n)
    assert dp.budget.accountant.order == order


def test_a_report_from_a_checkpoint_has_the_order_of_the_filter(tmp_path):
    dp = filtered(accountant=RDPFilter(16.0), noise_multiplier=3.0)
    fit(dp, steps=2).save_checkpoint(tmp_path / "a.ckpt")
    assert read_report(tmp_path / "a.ckpt").privacy.epsilon == dp.epsilon
    assert read_report(tmp_path / "a.ckpt", "rdp_filter").privacy.epsilon == dp.epsilon
    assert dp.epsilon < 0.5 * RDPFilter().for_target(3.0, 1e-3).epsilon(dp._run.ledger.phases, 1e-3)


def test_a_filter_needs_a_target():
    with pytest.raises(ldp.PrivacyConfigurationError, match="accountant='rdp_filter' without target_epsilon"):
        ldp.DPStrategy(noise_multiplier=1.0, accountant="rdp_filter")
