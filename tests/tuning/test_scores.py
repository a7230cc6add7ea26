"""Scores on private validation data: what they spend, how noisy they are, and what one example can change."""

from pathlib import Path

import dp_accounting
import lightning.pytorch as pl
import pytest
import torch
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import chi2
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_dp as ldp
from lightning_dp import PrivateSelection
from lightning_dp.accounting import Repetitions
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyConfigurationError
from lightning_dp.noise import SecretRandom
from lightning_dp.reporting import read_report
from lightning_dp.tuning import LinearHead
from lightning_dp.tuning.scores import Scores
from tests.tuning.test_command import config, run  # noqa: F401
from tests.tuning.test_tuner import DELTA, TARGET, TRAIN, Counted, counted, releases_on_disk, search, strategy  # noqa: F401

NOISE = 25.0
PAID = PrivateSelection(NOISE)
FEW = DataLoader(TensorDataset(*TRAIN[:6]), batch_size=4)


def their_epsilon(releases):
    theirs = PLDAccountant()
    for rate, noise, count in releases:
        assert rate == 1
        theirs.compose(dp_accounting.GaussianDpEvent(noise), count)
    return theirs.get_epsilon(DELTA)


def test_scores_and_runs_spend_the_target_together(counted, capsys):  # noqa: F811
    result = search(counted, selection=PAID, public=FEW)
    steps = sum(one.num_steps for one in result.outcomes)
    assert len(result.outcomes) == 4
    assert result.num_releases == steps + 4 == Counted.steps + 4
    kept = releases_on_disk()
    assert sum(count for _, noise, count in kept if noise == NOISE) == 4
    assert their_epsilon(kept) == pytest.approx(TARGET, abs=5e-3)
    assert their_epsilon([one for one in kept if one[1] != NOISE]) < TARGET - 0.004
    assert TARGET * (1 - 1e-6) < result.epsilon <= TARGET
    result.print()
    assert "private: its noisy scores are part of this epsilon" in " ".join(capsys.readouterr().out.split())


def test_a_run_made_again_pays_for_its_score_again(counted):  # noqa: F811
    Counted.fails_at = 1
    with pytest.raises(KeyError, match="on fire"):
        search(counted, selection=PAID, public=FEW)
    result = search(counted, selection=PAID, public=FEW)
    assert sum(count for _, noise, count in releases_on_disk() if noise == NOISE) == 5
    assert result.epsilon <= TARGET


def test_the_best_of_a_random_search_by_paid_scores(monkeypatch):
    monkeypatch.setattr(Repetitions, "draw", lambda self, rng: 2)
    arguments = {
        "strategy": strategy(),
        "space": {"lr": (0.05, 5.0)},
        "trainer": {"accelerator": "cpu", "max_steps": 4},
    }
    train = DataLoader(TRAIN, batch_size=len(TRAIN))
    result = ldp.random_search(lambda lr: LinearHead(4, 2, lr=lr), train, FEW, selection=PAID, **arguments)
    theirs = RdpAccountant()
    steps = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(result.noise_multiplier), 4)
    one = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(NOISE), steps])
    theirs.compose(RepeatAndSelectDpEvent(one, 10, 1))
    assert result.epsilon == pytest.approx(theirs.get_epsilon(DELTA), rel=0.02)
    assert 0.995 * TARGET < result.epsilon <= TARGET
    assert read_report(result.checkpoint).privacy.epsilon == result.epsilon
    assert read_report(result.checkpoint).privacy.num_releases == 5


def test_the_noise_is_that_of_the_bounds():
    selection, values, draws = PrivateSelection(3.0, (-1.0, 3.0)), [0.5, 2.5, 9.0, float("nan"), -4.0], 4000
    exact = (0.5 + 2.5 + 3.0 + 1.0 - 1.0) / 5
    std = 3.0 * 2.0 / 5
    random = SecretRandom()
    found = torch.tensor([selection.noisy_mean(values, random) for _ in range(draws)], dtype=torch.float64)
    assert abs(float(found.mean()) - exact) < 6 * std / draws**0.5

    def is_rejected(scale):
        statistic = float(((found - exact) / (scale * std)).square().sum())
        return not chi2.ppf(1e-9, draws) < statistic < chi2.ppf(1 - 1e-9, draws)

    assert not is_rejected(1.0)
    assert is_rejected(0.8)
    assert is_rejected(1.25)


class Peeking(LinearHead):
    """Its metric is about the whole batch, and out of all bounds."""

    sizes = []

    def validation_step(self, batch, batch_idx):
        Peeking.sizes.append(len(batch[0]))
        self.log("val_accuracy", 1e6 * batch[0].sum())


def test_one_example_changes_the_sum_by_its_bound_only(monkeypatch):
    """Neighbouring validation data, and a metric that makes the most of one example."""
    Peeking.sizes, sums = [], []
    monkeypatch.setattr(SecretRandom, "add_normal", lambda self, totals, std: sums.append(float(totals[0])))
    data = torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
    for size in (5, 4):
        loader = DataLoader(TensorDataset(*(part[:size] for part in data)), batch_size=4)
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        scores, module = Scores("val_accuracy", PAID), Peeking(4, 2)
        scores.check(trainer, module, {"dataloaders": loader})
        Peeking.sizes.clear()
        scores.score(trainer, module, {"dataloaders": loader})
        assert set(Peeking.sizes) == {1}
    assert abs(sums[0] - sums[1]) <= 0.5
    assert sums == [2.5, 2.0]


def test_private_validation_data_is_not_looked_at_during_a_fit(counted):  # noqa: F811
    seen = []

    class Watched(LinearHead):
        def validation_step(self, batch, batch_idx):
            seen.append(self.trainer.state.fn)
            super().validation_step(batch, batch_idx)

    arguments = {
        "strategy": strategy(),
        "space": {"lr": (0.05, 5.0)},
        "trainer": {"accelerator": "cpu", "max_epochs": 2},
    }
    train = DataLoader(TRAIN, batch_size=60)
    for selection, fits in ((PAID, False), ("public", True)):
        seen.clear()
        arguments["directory"] = str(selection)[:6]
        arguments["strategy"] = strategy()
        ldp.random_search(
            lambda lr: Watched(4, 2, lr=lr), train, FEW, selection=selection, repetitions=_One(), **arguments
        )
        assert ("fit" in {fn.value for fn in seen}) is fits


class _One(Repetitions):
    def draw(self, rng):
        return 1


class Endless(IterableDataset):
    def __iter__(self):
        yield from ((torch.ones(4), 0) for _ in range(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"public": DataLoader(Endless())}, "validation data of a PrivateSelection is a DataLoader: expected one"),
        (
            {"trainer": {"accelerator": "cpu", "logger": CSVLogger("logs")}},
            "logger=.*Logger in a search that private validation data",
        ),
        ({"selection": PrivateSelection(2.0)}, "scores of mu=0.5 leave epsilon .*more noise for the scores"),
    ],
)
def test_what_cannot_be_paid_for_is_refused_before_anything_is_spent(counted, changes, message):  # noqa: F811
    with pytest.raises(PrivacyConfigurationError, match=message):
        search(counted, **{"selection": PAID, "public": FEW, **changes})
    assert Counted.steps == 0
    assert not list(Path("tuning").glob("privacy-journal-*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "noise_multiplier=0 of PrivateSelection: expected noise"),
        ((-1.0,), "noise_multiplier=-1"),
        ((20.0, (1.0, 0.0)), r"bounds=\(1.0, 0.0\) of PrivateSelection: expected two numbers"),
        ((20.0, (0.0, float("inf"))), r"bounds=\(0.0, inf\) of PrivateSelection"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        PrivateSelection(*arguments)


def test_a_score_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(Repetitions, "draw", lambda self, rng: 1)
    with pytest.raises(
        PrivacyBudgetExceeded, match="noise_multiplier=0.5 beside the steps would exceed target_epsilon=1"
    ):
        ldp.random_search(
            lambda lr: LinearHead(4, 2, lr=lr),
            DataLoader(TRAIN, batch_size=60),
            FEW,
            selection=PrivateSelection(0.5),
            strategy=strategy(),
            space={"lr": (0.05, 5.0)},
            trainer={"accelerator": "cpu", "max_steps": 2},
        )


def test_a_configuration_with_private_validation_data(monkeypatch, config, capsys):  # noqa: F811
    options = ("--method", "random", "--selection", "private", "--score_noise", 30, "--trainer.max_steps=3")
    run(monkeypatch, "--config", config, *options, "--mean_runs", 2, "--directory", "found")
    assert "private: its noisy scores are part of this epsilon" in " ".join(capsys.readouterr().out.split())
    report = read_report("found/best.ckpt")
    assert 0.99 * 2.0 < report.privacy.epsilon <= 2.0
    assert report.privacy.num_releases == 4
