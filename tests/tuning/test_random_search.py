"""Random searches from end to end: what they spend, what they leave, and that nothing is chosen on the way."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_dp as ldp
from lightning_dp.accounting import RDPBestOf, Repetitions
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.reporting import read_report
from lightning_dp.tuning import LinearHead
from lightning_dp.tuning.candidates import Candidates, RandomSearch
from tests.accounting.test_best_of import their_epsilon
from tests.tuning.test_command import config, run  # noqa: F401
from tests.tuning.test_tuner import DELTA, PUBLIC, TARGET, TRAIN, Counted, counted, strategy  # noqa: F401

STEPS, SAMPLED = 4, {"batch_size": 30}


@pytest.fixture(autouse=True)
def three_runs(monkeypatch):
    draw_runs(monkeypatch, 3)


def draw_runs(monkeypatch, number):
    monkeypatch.setattr(Repetitions, "draw", lambda self, rng: number)


def search(make_module=lambda lr: LinearHead(4, 2, lr=lr), **changes):
    arguments = {"strategy": strategy(), "selection": "public", "space": {"lr": (0.05, 5.0)}}
    arguments["trainer"] = {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": -1, **changes.pop("trainer", {})}
    train = changes.pop("train", DataLoader(TRAIN, **SAMPLED))
    return ldp.random_search(make_module, train, PUBLIC.dataloader(), **{**arguments, **changes})


class Scored(LinearHead):
    """Keeps the learning rate and the last score of every run of a test."""

    seen = {}

    def on_validation_epoch_end(self):
        Scored.seen[self.lr] = float(self.val_accuracy.compute())


def test_the_best_run_is_all_that_is_left(capsys):
    Scored.seen = {}
    result = search(lambda lr: Scored(4, 2, lr=lr))
    assert len(Scored.seen) == 3
    assert result.score == max(Scored.seen.values())
    assert result.score == Scored.seen[result.values["lr"]]
    head = LinearHead.load_from_checkpoint(result.checkpoint, lr=1.0)
    assert float((head(PUBLIC.features).argmax(1) == PUBLIC.labels).float().mean()) == pytest.approx(result.score)
    assert {path.name for path in Path("random_search").iterdir()} == {"best.ckpt", "search.json", "search.lock"}
    saved = torch.load(result.checkpoint, weights_only=True)["lightning_dp"]["directory"]
    assert Path(saved).name == "run", "it tells which run was best"
    kept = Path("random_search/search.json").read_text()
    assert [lr for lr in Scored.seen if repr(lr) in kept] == [result.values["lr"]]
    assert json.loads(kept)["settings"] == json.loads(kept)["scores"] == []
    result.print()
    printed = " ".join(capsys.readouterr().out.split())
    assert "at delta 0.001, for the best of a random number of runs (10 expected, shape 1)" in printed


@pytest.mark.parametrize("train", [SAMPLED, {"batch_size": len(TRAIN)}])
def test_the_whole_search_spends_the_target(train):
    result = search(train=DataLoader(TRAIN, **train))
    rate = train["batch_size"] / len(TRAIN)
    theirs = their_epsilon(rate, result.noise_multiplier, STEPS, DELTA, 10, 1)
    assert result.num_steps == STEPS
    assert result.epsilon == pytest.approx(theirs, rel=1e-8 if rate == 1 else 0.03)
    assert 0.995 * TARGET < result.epsilon <= TARGET
    report = read_report(result.checkpoint)
    assert report.privacy.epsilon == result.epsilon
    assert report.privacy.num_releases == STEPS
    assert report.privacy.groups == ()
    assert "it knows one run" in report.privacy.cross_check.reason
    with pytest.raises(PrivacyConfigurationError, match="no report of .* by accountant='rdp'.*others would be forgot"):
        read_report(result.checkpoint, "rdp")
    assert read_report(result.checkpoint, RDPBestOf(Repetitions()).name).privacy.epsilon == result.epsilon


def test_whoever_goes_on_from_the_best_run_counts_the_others():
    result = search()

    def go_on(**changes):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=STEPS + 2,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            strategy=strategy(target_epsilon=5.0, noise_multiplier=result.noise_multiplier, **changes),
        )
        head = LinearHead(4, 2)
        trainer.fit(head, DataLoader(TRAIN, **SAMPLED), ckpt_path=result.checkpoint)
        return trainer.strategy

    name = RDPBestOf(Repetitions()).name
    with pytest.raises(PrivacyConfigurationError, match=r"accountant='prv' from a checkpoint that is the best .*10.0"):
        go_on()
    assert go_on(accountant=name).epsilon > result.epsilon


def test_random_numbers_afterwards_do_not_tell_how_many_runs_there_were(monkeypatch):
    found = []
    for number in (1, 3):
        draw_runs(monkeypatch, number)
        torch.manual_seed(0)
        search(directory=f"of {number}")
        found.append(float(torch.rand(1)))
    assert found[0] == found[1]


def test_a_run_that_was_interrupted_counts_and_is_not_made_again(counted):  # noqa: F811
    Counted.fails_at = STEPS + 2
    made = []
    with pytest.raises(KeyError, match="on fire"):
        search(lambda lr: made.append(lr) or counted(lr))
    interrupted = made[-1]
    result = search(lambda lr: made.append(lr) or counted(lr))
    assert len(made) == 3
    assert Counted.steps == STEPS + 2 + STEPS
    assert result.values["lr"] in {made[0], made[2]} - {interrupted}
    assert result.epsilon <= TARGET


def test_a_run_that_has_released_nothing_is_made_as_it_was_drawn(counted):  # noqa: F811
    Counted.fails_at = STEPS
    made = []
    with pytest.raises(KeyError, match="on fire"):
        search(lambda lr: made.append(lr) or counted(lr))
    search(lambda lr: made.append(lr) or counted(lr))
    assert made[1] == made[2]
    assert len(made) == 4
    assert Counted.steps == 3 * STEPS


def test_a_finished_search_is_not_made_again(counted):  # noqa: F811
    first = search(counted)
    steps = Counted.steps
    assert search(counted) == first
    assert Counted.steps == steps == 3 * STEPS


def test_another_mechanism_in_a_later_run_is_refused(counted):  # noqa: F811
    Counted.fails_at = STEPS
    with pytest.raises(KeyError, match="on fire"):
        search(counted)
    with pytest.raises(PrivacyConfigurationError, match=r"a run of the search has .*sample_rate=0.5 \(was 0.25\)"):
        search(counted, train=DataLoader(TRAIN, batch_size=60))
    assert Counted.steps == STEPS
    assert search(counted).num_steps == STEPS


@pytest.mark.parametrize("number", [0, 2])
def test_no_score_is_no_result_and_no_new_draw(monkeypatch, number):
    class Silent(LinearHead):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", float("nan"))

    draw_runs(monkeypatch, number)
    for _ in range(2):
        with pytest.raises(PrivacyError, match="no run of the search has a number as 'val_accuracy': nothing is rel"):
            search(lambda lr: Silent(4, 2, lr=lr), repetitions=Repetitions(5.0, float("inf")))
        draw_runs(monkeypatch, 3)
    assert len(json.loads(Path("random_search/search.json").read_text())["settings"]) == number


def test_the_least_metric_may_be_best():
    class Loss(LinearHead):
        seen = {}

        def validation_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            Loss.seen[self.lr] = float(loss)
            self.log("val_loss", loss)

    result = search(lambda lr: Loss(4, 2, lr=lr), monitor="val_loss", mode="min")
    assert result.score == pytest.approx(min(Loss.seen.values()))
    assert result.score == pytest.approx(Loss.seen[result.values["lr"]])
    assert len(set(Loss.seen.values())) == 3


def test_nothing_of_a_run_comes_into_the_next_by_callbacks():
    class Remembers(pl.Callback):
        fits, most = 0, 0

        def on_fit_start(self, trainer, pl_module):
            self.fits += 1
            Remembers.most = max(self.most, self.fits)

    search(trainer={"callbacks": [Remembers(), ldp.PrivacyReport()]})
    assert Remembers.most == 1
    assert not list(Path().rglob("privacy_report*"))


def test_the_draw_is_the_systems_and_of_the_distribution(monkeypatch, tmp_path):
    monkeypatch.undo()
    import random

    search_for = RandomSearch(TARGET, DELTA, Repetitions(4.0), {"lr": (0.1, 10.0), "momentum": (0.5, 0.9)}, "loss")
    drawn = search_for.draw(random.Random(3))
    assert len(drawn) == Repetitions(4.0).draw(random.Random(3))
    values = [one["lr"] for seed in range(300) for one in search_for.draw(random.Random(seed))]
    assert 0.1 <= min(values) < 0.11
    assert 9.0 < max(values) <= 10
    assert 0.45 < sum(value < 1 for value in values) / len(values) < 0.55
    torch.manual_seed(0)
    random.seed(0)
    first = Candidates(tmp_path / "first", search_for)
    first.begin()
    random.seed(0)
    second = Candidates(tmp_path / "second", search_for)
    second.begin()
    assert first._state["settings"] != second._state["settings"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"selection": "private"},
            r"selection='private': expected 'public' or a PrivateSelection.*Hold out public data",
        ),
        ({"mode": "best"}, "mode='best': expected 'max' or 'min'"),
        ({"monitor": "f1"}, r"monitor='f1': validation logs \['val_accuracy'\]"),
        ({"space": {}}, "space={}: expected at least one hyper-parameter"),
        ({"space": {"lr": (2, 1)}}, "lr=.* to search in: expected two numbers, 0 < least <= largest"),
        ({"strategy": "dp"}, "strategy='dp' of a search: expected a DPStrategy"),
        ({"trainer": {"devices": 2}}, "a search on 2 devices: it makes several trainers"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused_before_anything_is_spent(counted, changes, message):  # noqa: F811
    with pytest.raises(PrivacyConfigurationError, match=message):
        search(counted, **changes)
    assert Counted.steps == 0


def test_an_accountant_of_ones_own_is_refused():
    with pytest.raises(PrivacyConfigurationError, match="accountant='rdp' of a search: expected 'prv', the default"):
        search(strategy=strategy(accountant="rdp"))


def test_a_module_that_was_trained_is_refused():
    module = LinearHead(4, 2)
    with pytest.raises(PrivacyConfigurationError, match="make_module returned the LinearHead of the run before"):
        search(lambda lr: module)


def test_a_report_of_every_run_is_refused():
    class Reporting(LinearHead):
        def configure_callbacks(self):
            return [ldp.PrivacyReport()]

    with pytest.raises(
        PrivacyConfigurationError, match=r"PrivacyReport from configure_callbacks\(\) in a random search"
    ):
        search(lambda lr: Reporting(4, 2, lr=lr))
    search(trainer={"callbacks": [ldp.PrivacyReport()]}, directory="taken out")


def test_manual_optimization_is_refused():
    class Manual(LinearHead):
        automatic_optimization = False

    with pytest.raises(PrivacyConfigurationError, match="automatic_optimization=False of Manual in a search"):
        search(lambda lr: Manual(4, 2, lr=lr))


def test_a_configuration_is_searched(monkeypatch, config, capsys):  # noqa: F811
    options = ("--method", "random", "--selection", "public", "--data.batch_size=30", "--trainer.max_steps=3")
    space = ("--space", "model.lr", 0.1, 2, "--space", "model.momentum", 0.5, 0.9)
    run(monkeypatch, "--config", config, *options, *space, "--mean_runs", 5, "--directory", "found")
    printed = " ".join(capsys.readouterr().out.split())
    assert "(5 expected, shape 1)" in printed
    assert "model.momentum" in printed
    report = read_report("found/best.ckpt")
    assert 0.995 * 2.0 < report.privacy.epsilon <= 2.0
    assert report.privacy.num_releases == 3
    noise = report.record.mechanism.noise_multiplier
    assert report.privacy.epsilon == pytest.approx(their_epsilon(0.25, noise, 3, 1e-3, 5, 1), rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "trainer.max_steps", "3", "9"], "--space trainer.max_steps: expected an argument of the model"),
        (["--space", "model.lr", "low", "9"], "--space model.lr low 9: expected two numbers"),
        (["--mean_runs", "0.5"], "mean=0.5: expected a number above 1"),
    ],
)
def test_what_cannot_be_searched_ends_with_the_reason(monkeypatch, config, arguments, message):  # noqa: F811
    with pytest.raises(SystemExit, match=f"lightning-dp tune: .*{message}"):
        run(monkeypatch, "--config", config, "--method=random", "--selection=public", *arguments)


@pytest.mark.parametrize("arguments", [["--method", "random", "--num_runs", "3"], ["--method", "grid"]])
def test_arguments_of_the_other_method_are_refused(monkeypatch, config, capsys, arguments):  # noqa: F811
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config", config, "--selection", "public", *arguments)
    assert arguments[-2] in capsys.readouterr().err
