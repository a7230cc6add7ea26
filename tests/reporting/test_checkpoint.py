"""A report from a checkpoint alone, and the command."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_dp as ldp
from lightning_dp import cli
from lightning_dp.reporting import read_report, report_of
from tests.models import Regression, loader, trainer
from tests.reporting.fits import agrees, fitted, written


@pytest.fixture
def two_checkpoints():
    """Checkpoints at steps 2 and 4 of 5, with what the strategy said when they were saved."""
    said = {}

    class Notes(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            said[trainer.global_step] = trainer.strategy.epsilon

    saves = ModelCheckpoint("run", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=20.0, target_delta=1e-3)
    fit = fitted(strategy=strategy, callbacks=[saves, Notes()], max_steps=5)
    return said, fit.strategy


def test_epsilon_is_that_of_the_strategy(two_checkpoints):
    said, strategy = two_checkpoints
    Path("alone").mkdir()
    Path("run").rename("away")
    for step in (2, 4):
        alone = Path("alone", f"step={step}.ckpt")
        shutil.copy(Path("away", alone.name), alone)
        report = read_report(alone)
        assert report.privacy.epsilon == report.privacy.at_checkpoint.epsilon == said[step]
        assert (report.privacy.num_releases, report.privacy.at_checkpoint.file) == (step, alone.name)
        first, last = report.watched.history
        assert (first.event, last.event, last.step, last.epsilon) == ("start", "checkpoint", step, said[step])


def test_journals_beside_it_count(two_checkpoints):
    said, strategy = two_checkpoints
    before = sorted(path.name for path in Path("run").iterdir())
    report = read_report(Path("run", "step=2.ckpt"))
    assert report.privacy.epsilon == strategy.epsilon > said[2] == report.privacy.at_checkpoint.epsilon
    assert (report.privacy.num_releases, report.privacy.at_checkpoint.num_releases) == (5, 2)
    assert report.privacy.steps_left == strategy.budget.releases_left
    assert sorted(path.name for path in Path("run").iterdir()) == before


def test_it_is_the_report_of_the_fit():
    fit = fitted(max_steps=4, validation=loader(shuffle=False))
    fit.save_checkpoint("a.ckpt")
    live = fit.callbacks[0].report(fit)
    again = read_report("a.ckpt")
    assert (again.ledger, again.watched, again.not_covered) == (live.ledger, live.watched, live.not_covered)
    assert (again.record.training, again.record.mechanism) == (live.record.training, live.record.mechanism)
    assert (again.privacy.epsilon, again.privacy.groups) == (live.privacy.epsilon, live.privacy.groups)


def test_steps_left_are_not_known_if_other_releases_were_made_since():
    settings = {"target_epsilon": 30.0, "target_delta": 1e-3}
    fitted(strategy=ldp.DPStrategy(noise_multiplier=1.0, **settings), max_steps=3).save_checkpoint("a.ckpt")
    assert read_report("a.ckpt").privacy.steps_left > 0
    fitted(
        strategy=ldp.DPStrategy(noise_multiplier=2.0, changed_settings="new_phase", **settings),
        max_steps=5,
        ckpt_path="a.ckpt",
    )
    assert read_report("a.ckpt").privacy.num_releases == 5
    assert read_report("a.ckpt").privacy.steps_left is None


def test_a_checkpoint_of_weights_has_no_history():
    fitted().save_checkpoint("w.ckpt", weights_only=True)
    assert read_report("w.ckpt").watched.history == ()
    assert "names" in [limit.subject for limit in read_report("w.ckpt").not_covered]
    assert read_report("w.ckpt").privacy.num_releases == 3


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["lightning-dp", "report", *map(str, arguments)])
    cli.main()


def test_the_command_shows_and_writes_it(monkeypatch, capsys):
    fit = fitted(max_steps=4)
    fit.save_checkpoint("a.ckpt")
    run(monkeypatch, "a.ckpt", "--output", "made/again")
    shown = capsys.readouterr().out
    for expected in ("Privacy report", "known to a.ckpt alone", "net.weight", "Wrote made/again.json"):
        assert expected in shown
    data = written("made", "again")
    assert data["privacy"]["epsilon"] == fit.strategy.epsilon
    assert agrees(data)
    assert sorted(path.name for path in Path("made").iterdir()) == ["again.json", "again.md", "again.png"]


def test_the_command_alone_writes_nothing(monkeypatch, capsys):
    fitted().save_checkpoint("a.ckpt")
    before = sorted(Path().iterdir())
    run(monkeypatch, "a.ckpt")
    assert "Guarantee" in capsys.readouterr().out
    assert sorted(Path().iterdir()) == before


def test_the_command_says_why_there_is_no_report(monkeypatch):
    with pytest.raises(SystemExit, match="lightning-dp report: nowhere.ckpt is no file: expected a checkpoint"):
        run(monkeypatch, "nowhere.ckpt")
    with pytest.raises(SystemExit, match="expected a name without folder and suffix"):
        run(monkeypatch, "nowhere.ckpt", "--output", "made/again.json")


def test_another_accountant():
    fitted(max_steps=4).save_checkpoint("a.ckpt")
    report = read_report("a.ckpt", "rdp")
    settings = {"noise_multiplier": 1.0, "sample_rate": 0.25, "num_steps": 4, "delta": 1e-3}
    assert report.privacy.epsilon == ldp.compute_epsilon(**settings, accountant="rdp")
    assert report.privacy.accountant.name == "rdp"
    with pytest.raises(ldp.PrivacyConfigurationError, match="no report of a.ckpt: accountant='mine': expected"):
        read_report("a.ckpt", "mine")


def test_a_torn_journal_is_not_passed_over(monkeypatch):
    fitted().save_checkpoint("a.ckpt")
    Path("privacy-journal-0.json").write_text("torn")
    with pytest.raises(SystemExit, match="The privacy journal privacy-journal-0.json cannot be read"):
        run(monkeypatch, "a.ckpt")


def test_a_checkpoint_without_privacy():
    plain = trainer("auto")
    plain.fit(Regression(), loader())
    plain.save_checkpoint("plain.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match="plain.ckpt is no checkpoint of a private fit"):
        read_report("plain.ckpt")
    torch.save([1, 2], "list.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match="list.ckpt is no checkpoint of a private fit"):
        read_report("list.ckpt")


def test_a_checkpoint_without_a_record():
    fitted().save_checkpoint("a.ckpt")
    checkpoint = torch.load("a.ckpt", weights_only=True)
    del checkpoint["lightning_dp"]["record"]
    with pytest.raises(ldp.PrivacyConfigurationError, match="old.ckpt holds a ledger of releases, but no record"):
        report_of(checkpoint, Path("old.ckpt"))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint(content):
    Path("a.ckpt").write_bytes(content)
    with pytest.raises(ldp.PrivacyConfigurationError, match="a.ckpt cannot be read as a checkpoint"):
        read_report("a.ckpt")


class Setting:
    """Somebody's hyperparameter."""


def test_a_checkpoint_with_other_objects_names_the_way_out():
    fitted(max_steps=2).save_checkpoint("a.ckpt")
    checkpoint = torch.load("a.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": Setting()}, "own.ckpt")
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"report_of\(torch.load\(path, weights_only=False\)"):
        read_report("own.ckpt")
    report = report_of(torch.load("own.ckpt", weights_only=False), Path("own.ckpt"))
    assert report.privacy.num_releases == 2
