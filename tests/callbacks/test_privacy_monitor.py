"""What the monitor logs and prints."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_dp as ldp
from lightning_dp.private_statistics import PrivateStatistics
from tests.models import Regression, loader, trainer


def read(log):
    with open(f"{log.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def logged(tmp_path, strategy, steps=6):
    log = CSVLogger(tmp_path)
    fit = trainer(strategy, max_steps=steps, logger=log, log_every_n_steps=1, callbacks=[ldp.PrivacyMonitor()])
    fit.fit(Regression(), loader())
    return fit, read(log)


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


def test_the_summary_is_of_what_was_released_not_of_what_would_come_next(capsys):
    dp = ldp.DPStrategy(noise_multiplier=1.5, schedule=[ldp.Stage(3), ldp.Stage(3, noise_factor=2.0)])
    trainer(dp, callbacks=[ldp.PrivacyMonitor()]).fit(Regression(), loader())
    printed = capsys.readouterr().out
    assert "3 × 1.5 at 0.25" in printed
    assert dp.noise_multiplier == 3.0


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


# ---- what is not private ---------------------------------------------------------------------------------------------


class Fixed(Regression):
    """Samples x with the gradient x, for a loss that is x times the parameters."""

    def training_step(self, batch, batch_idx):
        return (self.net.weight.sum(0) * batch[0]).sum(1).mean()


def per_sample(data):
    """Norms of the gradients of `Fixed`, by hand: every one of two rows of the weight has the gradient x."""
    return (2 * data.dataset.tensors[0].square().sum(1)).sqrt()


@pytest.mark.parametrize("settings", [{}, {"max_physical_batch_size": 3}, {"clipping_engine": "loop"}])
def test_private_statistics_are_those_of_the_drawn_samples(tmp_path, settings):
    log, data = CSVLogger(tmp_path), loader(batch_size=20)  # everything is drawn
    dp = ldp.DPStrategy(noise_multiplier=1.0, max_grad_norm=2.0, private_statistics=True, **settings)
    fit = trainer(dp, max_steps=1, logger=log, log_every_n_steps=1, callbacks=[ldp.PrivacyMonitor(summary=False)])
    module = Fixed()
    before = module.net.weight.detach().clone()
    fit.fit(module, data)
    (row,) = read(log)
    norms = per_sample(data)
    assert float(row["private/clipped_share"]) == pytest.approx(float((norms > 2.0).double().mean()))
    assert 0 < float(row["private/clipped_share"]) < 1
    assert float(row["private/grad_norm"]) == pytest.approx(float(norms.median()), rel=1e-5)
    loss = float((before.sum(0) * data.dataset.tensors[0]).sum(1).mean())
    assert float(row["private/train_loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_a_sum_is_logged_as_a_mean(tmp_path):
    class Sum(Fixed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * len(batch[0])

    log, data, module = CSVLogger(tmp_path), loader(batch_size=20), Sum()
    loss = float((module.net.weight.detach().sum(0) * data.dataset.tensors[0]).sum(1).mean())
    dp = ldp.DPStrategy(noise_multiplier=1.0, loss_reduction="sum", private_statistics=True)
    trainer(dp, max_steps=1, logger=log, log_every_n_steps=1, callbacks=[ldp.PrivacyMonitor()]).fit(module, data)
    assert float(read(log)[0]["private/train_loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_by_default_nothing_of_it_exists(tmp_path):
    fit, rows = logged(tmp_path, ldp.DPStrategy(noise_multiplier=2.0))
    assert fit.strategy.private_statistics is None
    assert not [name for name in rows[0] if name.startswith("private/")]


def test_statistics_of_odd_batches():
    statistics = PrivateStatistics()
    assert statistics.values() == {}
    statistics.begin()
    statistics.add_norms((torch.tensor([float("nan"), float("inf"), 0.5]), 1.0))
    statistics.add_loss(torch.tensor(3.0), 0)  # an empty draw
    assert statistics.values() == {"clipped_share": pytest.approx(2 / 3), "grad_norm": 0.5}
    statistics.begin()
    statistics.add_norms((torch.tensor([float("nan")]), 1.0))
    assert statistics.values() == {"clipped_share": 1.0}
    statistics.begin()  # two groups of parameters, each with a bound of its own
    statistics.add_norms((torch.tensor([3.0, 0.3, 0.0]), 1.0), (torch.tensor([4.0, 0.4, 2.5]), 2.0))
    assert statistics.values() == {"clipped_share": pytest.approx(2 / 3), "grad_norm": pytest.approx(2.5)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_multiplier": 2.0}, "if results did not decide when to stop"),
        ({"target_epsilon": 3.0}, "The target epsilon 3 and delta hold for adding or removing one example"),
        (
            {"target_epsilon": 3.0, "accountant": "rdp_filter"},
            "whatever results the noise, the sample rate and the end",
        ),
        ({"noise_multiplier": 0.0}, "there is no guarantee"),
    ],
)
def test_the_claim_is_beside_epsilon(settings, words, capsys):
    strategy = ldp.DPStrategy(**settings)
    fit = trainer(strategy, max_steps=2, callbacks=[ldp.PrivacyMonitor()])
    fit.fit(Regression(), loader())
    assert words in strategy.claim
    assert words.split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_what_a_logger_gets_is_of_its_own_step(tmp_path):
    log = CSVLogger(tmp_path)
    dp = ldp.DPStrategy(noise_multiplier=2.0, target_epsilon=50.0, target_delta=1e-3)
    run = trainer(dp, max_steps=12, logger=log, log_every_n_steps=3, callbacks=[ldp.PrivacyMonitor(summary=False)])
    run.fit(Regression(), loader())
    most = ldp.max_steps(target_epsilon=50.0, target_delta=1e-3, noise_multiplier=2.0, sample_rate=0.25)
    assert [float(row["privacy/steps_left"]) for row in read(log)] == [most - n for n in (3, 6, 9, 12)]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(0.0, [1, 26, 51, 76]), (0.0015, [1, 39, 77]), (0.5, [1, 126])],  # every second, 1.5 seconds, 5 seconds
)
def test_it_logs_every_second_to_five_if_no_logger_asks(monkeypatch, cost, expected):
    """Steps of 40 ms on a clock that the test turns; the first of an epoch is shown too."""
    shown, clock = [], SimpleNamespace(now=100.0)
    turned = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("lightning_dp.callbacks.privacy_monitor.time", turned)

    class Notes(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            clock.now += 0.04 + 1e-9

        def log(self, name, *args, **kwargs):
            shown.append(self.trainer.global_step)
            clock.now += cost
            super().log(name, *args, **kwargs)

    monitor = ldp.PrivacyMonitor(summary=False)
    trainer(max_steps=130 if cost > 0.1 else 80, log_every_n_steps=1, callbacks=[monitor]).fit(Notes(), loader(n=700))
    assert shown == expected
