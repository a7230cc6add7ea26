"""What the report holds after real fits, and when it is written."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.callbacks import privacy_report
from lightning_dp.reporting import read_report
from tests.models import Regression, loader, trainer
from tests.reporting.fits import agrees, fitted, recomputed, written
from tests.strategies.test_manual import GAN, FeatureMatching, real_samples
from tests.strategies.test_users import Mean, users


@pytest.fixture
def figures():
    """Asks for figures, which take a while."""


@pytest.fixture(autouse=True)
def _figures_if_asked_for(request, monkeypatch):
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("lightning_dp.reporting.files.can_plot", lambda: False)


def names(parameters):
    return [parameter["name"] for parameter in parameters]


def test_an_ordinary_fit(figures):
    fit = fitted(max_steps=6)
    data = written()
    assert agrees(data)
    privacy, record = data["privacy"], data["record"]
    assert privacy["epsilon"] == fit.strategy.epsilon
    assert (privacy["delta"], privacy["num_releases"], privacy["steps_left"]) == (1e-3, 6, None)
    assert privacy["accountant"]["library"].startswith("prv-accountant 0.2")
    assert data["ledger"] == [
        {
            "noise_multiplier": 1.0,
            "sample_rate": 0.25,
            "num_releases": 6,
            "num_units": 20,
            "unit": "example",
            "partition": None,
            "sampling": "poisson",
        }
    ]
    assert record["sampler"] == {
        "kind": "poisson",
        "dataset": "TensorDataset",
        "num_examples": 20,
        "num_units": 20,
        "examples_per_unit": 1,
        "batches_per_epoch": 4,
        "max_physical_batch_size": 5,
        "views_per_example": 1,
    }
    training = record["training"]
    assert [(p["name"], p["shape"], p["count"]) for p in training["trained"]] == [
        ("net.weight", [2, 3], 6),
        ("net.bias", [2], 2),
    ]
    assert training["optimizers"] == [{"kind": "SGD", "private": True}]
    assert training["self_check"] == {"result": "passed", "num_samples": 4}
    assert torch.__version__.startswith(record["versions"]["torch"].partition("+")[0])
    assert Path("privacy_report.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_accountant_is_one_of_its_own():
    fitted(max_steps=6)
    data = written()
    check = data["privacy"]["cross_check"]
    assert check["library"].startswith("dp-accounting")
    assert check["epsilon"] == pytest.approx(recomputed(data), rel=0.01)


def test_manual_optimization():
    strategy = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3)
    fitted(GAN().double(), real_samples(4), strategy, max_steps=-1, max_epochs=2)
    data = written()
    assert agrees(data)
    training = data["record"]["training"]
    assert training["optimization"] == "manual"
    assert [o["private"] for o in training["optimizers"]] == [False, True]
    assert all(name.startswith("discriminator") for name in names(training["trained"]))
    assert all(name.startswith("generator") for name in names(training["public"]))
    (limit,) = [limit for limit in data["not_covered"] if limit["subject"] == "parameters without noise"]
    assert limit["found"] == names(training["public"])


def test_several_releases_from_one_draw_are_in_the_ledger_as_accounted():
    strategy = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3)
    fitted(FeatureMatching().double(), real_samples(4), strategy, max_steps=-1, max_epochs=2)
    data = written()
    assert data["record"]["mechanism"]["releases_per_draw"] == 2
    assert data["ledger"][0]["noise_multiplier"] == pytest.approx(2 / 2**0.5)
    assert agrees(data)


def test_the_loop_needs_no_self_check():
    fitted(strategy=ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, clipping_engine="loop"))
    training = written()["record"]["training"]
    assert (training["engine"], training["self_check"]["result"]) == ("loop", "not needed")


def test_a_self_check_that_was_switched_off_is_a_limit():
    fitted(strategy=ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, self_check=False))
    data = written()
    assert data["record"]["training"]["self_check"] == {"result": "off", "num_samples": 0}
    assert "self-check" in [limit["subject"] for limit in data["not_covered"]]


def test_one_example_is_too_few_to_check():
    one = DataLoader(TensorDataset(torch.ones(1, 3), torch.ones(1, 2)), batch_size=1)
    fitted(data=one)
    assert written()["record"]["training"]["self_check"]["result"] == "too few samples"


def test_frozen_and_untrained_parameters():
    class Parts(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
            self.net[0].weight.requires_grad_(False)
            self.spare = nn.Parameter(torch.zeros(()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

    fitted(Parts())
    training = written()["record"]["training"]
    assert names(training["frozen"]) == ["net.0.weight"]
    assert training["untrained"] == [{"name": "spare", "shape": [], "count": 1}]
    assert names(training["trained"]) == ["net.0.bias", "net.1.weight", "net.1.bias"]


def test_parameters_that_were_ever_trained_stay_among_them():
    class Thaws(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.net.bias.requires_grad_(batch_idx < 1)

    fitted(Thaws())
    data = written()
    assert names(data["record"]["training"]["trained"]) == ["net.weight", "net.bias"]
    (hooks,) = [limit["found"] for limit in data["not_covered"] if limit["subject"] == "hooks and callbacks"]
    assert hooks == ["Thaws.on_train_batch_start"]


def test_without_noise_epsilon_is_infinite():
    fitted(strategy=ldp.DPStrategy(noise_multiplier=0.0))
    data = written()
    assert data["privacy"]["epsilon"] == "infinity"
    assert data["privacy"]["groups"] == []
    assert "**This run is NOT private**" in Path("privacy_report.md").read_text()


class Logs(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_number", float(self.current_epoch))


class Looks(Callback):
    pass


def test_history_and_names_that_were_logged():
    fit = fitted(
        Logs(), callbacks=[Looks(), ldp.PrivacyMonitor(summary=False)], max_steps=8, validation=loader(shuffle=False)
    )
    data = written()
    watched, limits = data["watched"], {limit["subject"]: limit["found"] for limit in data["not_covered"]}
    assert limits["training metrics"] == ["train_loss (training_step)", "epoch_number (on_train_epoch_end)"]
    assert limits["validation and test data"] == ["val_loss"]
    assert limits["hooks and callbacks"] == ["Logs.on_train_epoch_end", "Looks"]
    assert [(p["event"], p["step"]) for p in watched["history"]] == [
        ("start", 0),
        ("validation", 4),
        ("validation", 8),
        ("end", 8),
    ]
    for point in watched["history"]:
        spent = ldp.compute_epsilon(noise_multiplier=1.0, sample_rate=0.25, num_steps=point["num_releases"], delta=1e-3)
        assert point["epsilon"] == spent
        assert list(point["metrics"]) == (["val_loss"] if point["event"] == "validation" else [])
    assert watched["history"][2]["metrics"]["val_loss"] == float(fit.callback_metrics["val_loss"])


def test_a_metric_that_is_not_finite_is_null():
    class NotANumber(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(float("nan")))

    fitted(NotANumber(), max_steps=4, validation=loader(shuffle=False))
    assert written()["watched"]["history"][1]["metrics"] == {"val_loss": None}


def test_sanity_checks_and_validation_by_itself_are_no_history():
    fit = fitted(max_steps=2, validation=loader(shuffle=False), num_sanity_val_steps=1)
    before = written()["watched"]["history"]
    fit.validate(Regression(), loader(shuffle=False), verbose=False)
    assert [point["event"] for point in before] == ["start", "end"]
    assert fit.callbacks[0].state_dict()["watched"]["history"] == before


def test_private_statistics_come_first():
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, max_grad_norm=1e-6, private_statistics=True)
    fitted(strategy=strategy, callbacks=[ldp.PrivacyMonitor(summary=False)])
    data = written()
    assert data["not_covered"][0]["subject"] == "private statistics"
    assert "private/clipped_share (on_train_batch_end)" in data["not_covered"][1]["found"]
    shares = [point["clipped_share"] for point in data["watched"]["history"]]
    assert shares[0] is None
    assert shares[1] in (None, 1.0)  # an empty draw has none
    assert Path("privacy_report.md").read_text().split("\n\n")[1].startswith("**Not private as it stands.**")


def test_it_says_that_nothing_was_logged():
    fitted()
    assert "No name was logged by self.log." in Path("privacy_report.md").read_text()


def test_clipped_shares_are_kept_only_if_they_are_asked_for():
    fitted()
    data = written()
    assert {point["clipped_share"] for point in data["watched"]["history"]} == {None}
    assert "private statistics" not in [limit["subject"] for limit in data["not_covered"]]


def test_a_schedule():
    stages = [ldp.Stage(2), ldp.Stage(1, noise_factor=2.0, batch_size_factor=0.5)]
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3, schedule=stages)
    fitted(strategy=strategy, max_steps=5)
    data = written()
    assert [(r["noise_multiplier"], r["sample_rate"], r["num_releases"]) for r in data["ledger"]] == [
        (1.0, 0.25, 2),
        (2.0, 0.125, 3),
    ]
    assert agrees(data)
    assert data["record"]["mechanism"]["noise_multiplier"] == 1.0
    assert data["record"]["mechanism"]["schedule"][1] == {
        "num_steps": 1,
        "noise_factor": 2.0,
        "batch_size_factor": 0.5,
    }
    assert data["privacy"]["epsilon"] == strategy.epsilon


def test_users():
    strategy = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3)
    fitted(Mean(), users(m=2, batch_size=4, partition="north"), strategy)
    data = written()
    assert agrees(data)
    assert (data["privacy"]["unit"], data["privacy"]["groups"]) == ("user", [])
    sampler = data["record"]["sampler"]
    assert (sampler["num_examples"], sampler["num_units"], sampler["examples_per_unit"]) == (13, 5, 2)
    (row,) = data["ledger"]
    assert (row["unit"], row["num_units"], row["partition"], row["sample_rate"]) == ("user", 5, "north", 0.4)


def test_a_filter():
    strategy = ldp.DPStrategy(noise_multiplier=2.0, target_epsilon=8.0, target_delta=1e-3, accountant="rdp_filter")
    fit = fitted(strategy=strategy, max_steps=3)
    data = written()
    assert data["privacy"]["accountant"]["name"] == "rdp_filter"
    assert data["privacy"]["epsilon"] == strategy.epsilon >= recomputed(data)
    fit.save_checkpoint("a.ckpt")
    assert read_report("a.ckpt").privacy.epsilon == strategy.epsilon


def test_the_report_tells_nothing_about_what_the_examples_are():
    def told(seed):
        torch.manual_seed(0)
        fitted(Logs(), loader(seed=seed), max_steps=3)
        data = written()
        data["created"] = data["record"]["recorded"] = None
        return data

    assert told(1) == told(2)


def test_a_second_fit_reports_both():
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    fit = trainer(strategy, callbacks=[ldp.PrivacyReport("both")], max_steps=2)
    for steps in (2, 5):
        fit.fit_loop.epoch_loop.max_steps = steps
        fit.fit(Regression(), loader())
    data = written(name="both")
    assert data["privacy"]["num_releases"] == 5
    assert agrees(data)
    assert [point["event"] for point in data["watched"]["history"]] == ["start", "end"] * 2


def test_a_resumed_fit_reports_all_of_it():
    fitted(max_steps=3).save_checkpoint("a.ckpt")
    stronger = ldp.DPStrategy(noise_multiplier=2.0, target_delta=1e-3, changed_settings="new_phase")
    fitted(strategy=stronger, max_steps=7, ckpt_path="a.ckpt")
    data = written()
    assert [(row["noise_multiplier"], row["num_releases"]) for row in data["ledger"]] == [(1.0, 3), (2.0, 4)]
    assert agrees(data)
    assert [(p["event"], p["num_releases"]) for p in data["watched"]["history"]] == [
        ("start", 0),
        ("end", 3),
        ("start", 3),
        ("end", 7),
    ]


def test_a_resumed_fit_without_a_step_knows_what_was_trained():
    settings = {"noise_multiplier": 1.0, "target_epsilon": 8.0, "target_delta": 1e-3}
    stops = [ldp.PrivacyBudgetStopping(verbose=False)]
    first = fitted(strategy=ldp.DPStrategy(**settings), callbacks=stops, max_steps=1000)
    first.save_checkpoint("a.ckpt")
    again = ldp.DPStrategy(**settings)
    fitted(strategy=again, callbacks=stops, max_steps=1000, ckpt_path="a.ckpt")
    data = written()
    assert again.num_releases == first.strategy.num_releases
    assert names(data["record"]["training"]["trained"]) == ["net.weight", "net.bias"]
    assert data["privacy"]["steps_left"] == 0
    assert data["privacy"]["epsilon"] <= 8.0


class Fails(Regression):
    def __init__(self, error, at=2):
        super().__init__()
        self.error, self.at = error, at

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == self.at:
            raise self.error


def test_an_exception_is_reported_once_something_was_released():
    with pytest.raises(ValueError, match="broken"):
        fitted(Fails(ValueError("broken")))
    data = written()
    assert [(p["event"], p["num_releases"]) for p in data["watched"]["history"]] == [("start", 0), ("exception", 2)]
    assert agrees(data)
    assert "broken" not in str(data)  # what an error says may be about the data


def test_an_exception_before_the_first_release_writes_nothing():
    with pytest.raises(ValueError, match="broken"):
        fitted(Fails(ValueError("broken"), at=0))
    assert not list(Path().glob("privacy_report*"))


def test_an_interrupted_fit():
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fitted(Fails(KeyboardInterrupt()))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert written()["privacy"]["num_releases"] == 2


def test_a_budget_that_ends_the_fit():
    strategy = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=4.0, target_delta=1e-3)
    with pytest.raises(ldp.PrivacyBudgetExceeded, match="would exceed"):
        fitted(strategy=strategy, max_steps=1000)
    data = written()
    assert data["privacy"]["steps_left"] == 0
    assert data["privacy"]["num_releases"] == strategy.num_releases > 0


def test_a_report_that_cannot_be_written_does_not_hide_the_error(monkeypatch, caplog):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(privacy_report, "write_report", full)
    with pytest.raises(ValueError, match="broken"):
        fitted(Fails(ValueError("broken")))
    assert "was not written: no space left" in caplog.text
    with pytest.raises(OSError, match="no space left"):
        fitted()


def test_beside_the_logs():
    logger = CSVLogger("logs", version=3)
    fitted(logger=logger, max_steps=1)
    assert written(logger.log_dir)["privacy"]["num_releases"] == 1


def test_on_the_first_process_only(monkeypatch):
    fit = trainer(callbacks=[ldp.PrivacyReport()])
    monkeypatch.setattr(type(fit), "is_global_zero", property(lambda _: False))
    fit.fit(Regression(), loader())
    assert not list(Path().glob("privacy_report*"))


def test_without_matplotlib(figures, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("lightning_dp.plotting.find_spec", lambda name: None)
    fitted()
    assert not Path("privacy_report.png").exists()
    assert "pip install 'lightning-dp[plot]'" in Path("privacy_report.md").read_text()
    assert not [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]
    written()


def test_a_plan_writes_and_notes_nothing():
    report = ldp.PrivacyReport()
    ldp.plan(trainer(callbacks=[report]), Regression(), loader(), show=False)
    assert not list(Path().glob("privacy_report*"))
    assert report.state_dict()["watched"]["history"] == []


def test_a_strategy_without_privacy_is_refused():
    with pytest.raises(ldp.PrivacyConfigurationError, match="PrivacyReport with strategy=SingleDeviceStrategy"):
        trainer("auto", callbacks=[ldp.PrivacyReport()]).fit(Regression(), loader())


@pytest.mark.parametrize("filename", ["", ".", "a/b", "report.json", None])
def test_a_filename_is_a_name(filename):
    with pytest.raises(ldp.PrivacyConfigurationError, match="expected a name without folder and suffix"):
        ldp.PrivacyReport(filename)


def test_checkpoints_hold_the_history():
    checkpoints = ModelCheckpoint(".", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fitted(callbacks=[checkpoints], max_steps=4, validation=loader(shuffle=False))
    state = torch.load("step=4.ckpt", weights_only=True)["callbacks"]["PrivacyReport"]
    assert [point["event"] for point in state["watched"]["history"]][0] == "start"
