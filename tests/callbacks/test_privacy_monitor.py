"""What the monitor logs and prints."""

import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_dp as ldp
from tests.models import Regression, loader, trainer


def logged(tmp_path, strategy, steps=6):
    import csv

    log = CSVLogger(tmp_path)
    fit = trainer(strategy, max_steps=steps, logger=log, log_every_n_steps=1, callbacks=[ldp.PrivacyMonitor()])
    fit.fit(Regression(), loader())
    with open(f"{log.log_dir}/metrics.csv") as file:
        return fit, list(csv.DictReader(file))


def test_epsilon_and_steps_left_after_every_step(tmp_path):
    strategy = ldp.DPStrategy(noise_multiplier=2.0, target_epsilon=5.0, target_delta=1e-3)
    _, rows = logged(tmp_path, strategy)
    most = ldp.max_steps(target_epsilon=5.0, target_delta=1e-3, noise_multiplier=2.0, sample_rate=0.25)
    assert [float(row["privacy/steps_left"]) for row in rows] == [most - n for n in range(1, 7)]
    for n, row in enumerate(rows, 1):
        exact = ldp.compute_epsilon(noise_multiplier=2.0, sample_rate=0.25, num_steps=n, delta=1e-3)
        assert exact * (1 - 1e-6) <= float(row["privacy/epsilon"]) <= 1.3 * exact


def test_without_a_target_there_are_no_steps_left_to_show(tmp_path):
    _, rows = logged(tmp_path, ldp.DPStrategy(noise_multiplier=2.0))
    assert "privacy/steps_left" not in rows[0]


def test_both_are_on_the_progress_bar(tmp_path):
    fit, _ = logged(tmp_path, ldp.DPStrategy(target_epsilon=2.0))
    assert {"privacy/epsilon", "privacy/steps_left"} <= set(fit.progress_bar_metrics)


def test_the_summary_tells_what_was_spent(capsys):
    strategy = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    trainer(strategy, callbacks=[ldp.PrivacyMonitor()]).fit(Regression(), loader())
    printed = capsys.readouterr().out
    for expected in ("Privacy summary", f"{strategy.epsilon:.4f} of 2", "0.001", "one training example"):
        assert expected in printed
    trainer(ldp.DPStrategy(noise_multiplier=1.0), callbacks=[ldp.PrivacyMonitor(summary=False)]).fit(
        Regression(), loader()
    )
    assert "Privacy summary" not in capsys.readouterr().out


def test_longer_than_planned(tmp_path):
    strategy = ldp.DPStrategy(noise_multiplier=50.0)
    fit = trainer(strategy, max_steps=-1, max_epochs=-1, callbacks=[ldp.PrivacyMonitor()], limit_train_batches=1)
    fit.fit_loop.epoch_loop.max_steps = 3
    fit.fit(Regression(), loader())
    budget = strategy.budget
    for _ in range(1200):
        budget.book()
    assert strategy.epsilon <= budget.epsilon_at_most <= 1.2 * strategy.epsilon


@pytest.mark.parametrize("callback", [ldp.PrivacyMonitor, ldp.PrivacyBudgetStopping])
def test_a_private_strategy_is_needed(callback):
    with pytest.raises(ldp.PrivacyConfigurationError, match=f"{callback.__name__} with strategy=SingleDeviceStrategy"):
        trainer("auto", callbacks=[callback()]).fit(Regression(), loader())
