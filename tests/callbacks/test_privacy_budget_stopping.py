"""What the stop says; that it stops in time is tested with the budget."""

import logging

import pytest

import lightning_dp as ldp
from tests.models import Regression, loader, trainer


@pytest.mark.parametrize("verbose", [True, False])
def test_one_line_says_why_the_fit_ended(verbose, caplog):
    caplog.set_level(logging.INFO)
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=4.0, target_delta=1e-3)
    fit = trainer(strategy, max_steps=1000, callbacks=[ldp.PrivacyBudgetStopping(verbose=verbose)])
    fit.fit(Regression(), loader())
    said = [r.message for r in caplog.records if "budget spent" in r.message]
    assert len(said) == int(verbose)
    if verbose:
        assert f"of 4 at delta 0.001 after {strategy.num_releases} steps" in said[0]


def test_the_minimum_is_restored_after_an_error():
    class Fails(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.should_stop:
                raise ValueError("late")

    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=4.0, target_delta=1e-3)
    fit = trainer(strategy, max_steps=1000, min_steps=900, callbacks=[ldp.PrivacyBudgetStopping()])
    with pytest.raises(ValueError, match="late"):
        fit.fit(Fails(), loader())
    assert fit.fit_loop.min_steps == 900
