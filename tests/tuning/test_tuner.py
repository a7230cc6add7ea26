"""Searches from end to end: what they spend, whatever fails in between."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyConfigurationError, PrivacyError
from lightning_dp.tuning import FrozenFeatures, LinearHead, SearchSpace, tune
from lightning_dp.tuning.history import History
from tests.accounting.oracles import pld_epsilon
from tests.tuning.test_shares import mu_by_formula

DELTA, TARGET = 1e-3, 1.0
SPACE = SearchSpace(lr=(0.1, 2.0), num_steps=(3, 9))


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return FrozenFeatures(torch.nn.Identity(), TensorDataset(x, (x[:, 0] > 0).long()))


TRAIN, PUBLIC = data(120, 1), data(50, 2)


def strategy(**changes):
    return ldp.DPStrategy(**{"target_epsilon": TARGET, "target_delta": DELTA, "self_check": False, **changes})


def search(make_module=lambda lr: LinearHead(4, 2, lr=lr), **changes):
    loaders = changes.pop("train", TRAIN.dataloader()), changes.pop("public", PUBLIC.dataloader())
    arguments = {"strategy": strategy(), "selection": "public", "space": SPACE, "trainer": {"accelerator": "cpu"}}
    arguments["num_runs"] = (2, 1)
    return tune(make_module, *loaders, **{**arguments, **changes})


def releases_on_disk(directory="tuning"):
    """Read from the checkpoint alone, by another way than the ledger's."""
    segments = torch.load(Path(directory) / "final.ckpt", weights_only=False)["lightning_dp"]["ledger"]["segments"]
    rows = [row for segment in segments.values() for row in segment]
    return [(row["sample_rate"], row["noise_multiplier"], row["num_releases"]) for row in rows]


class Counted(LinearHead):
    """Counts the optimizer's steps over all runs of a test, and fails before one of them if asked to."""

    steps, fails_at = 0, None

    def on_train_batch_start(self, batch, batch_idx):
        if Counted.steps == Counted.fails_at:
            Counted.fails_at = None
            raise KeyError("the machine is on fire")

    def on_before_optimizer_step(self, optimizer):
        Counted.steps += 1


@pytest.fixture
def counted():
    Counted.steps, Counted.fails_at = 0, None
    return lambda lr: Counted(4, 2, lr=lr)


def test_seven_runs_spend_the_target_together(counted, capsys):
    result = search(counted, num_runs=(3, 3))
    stages = [one.stage for one in result.outcomes]
    assert stages == [0, 0, 0, 1, 1, 1, 2]
    assert result.num_releases == sum(one.num_steps for one in result.outcomes) == Counted.steps
    assert pld_epsilon(releases_on_disk(), DELTA) == pytest.approx(TARGET, abs=5e-3)
    assert TARGET * (1 - 1e-6) < result.epsilon <= TARGET
    assert math.fsum(n for _, _, n in releases_on_disk()) == result.num_releases
    expected = Counter()
    for one in result.outcomes:
        noise = math.sqrt(one.num_steps) / mu_by_formula(one.epsilon, DELTA)
        expected[f"{noise:.6g}"] += one.num_steps
    assert Counter({f"{noise:.6g}": n for _, noise, n in releases_on_disk()}) == expected
    result.print()
    printed = capsys.readouterr().out
    assert "epsilon 1.0000 of 1 at delta 0.001" in " ".join(printed.split())
    assert printed.count("final") >= 1


def test_the_final_setting_is_that_of_the_line_through_the_best_runs():
    result = search()
    best = [max((o for o in result.outcomes if o.stage == k), key=lambda o: o.score) for k in (0, 1)]
    slope = (best[1].r - best[0].r) / (best[1].epsilon - best[0].epsilon)
    expected = best[1].r + slope * (result.final.epsilon - best[1].epsilon) if slope > 0 else best[1].r
    assert result.final.r == pytest.approx(min(18.0, max(0.3, expected)))
    assert result.final.score > 0.8
    module = LinearHead.load_from_checkpoint(result.checkpoint, lr=1.0)
    correct = (module(PUBLIC.features).argmax(1) == PUBLIC.labels).float().mean()
    assert float(correct) == pytest.approx(result.final.score)


def test_the_least_metric_may_be_best():
    class Loss(LinearHead):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    result = search(lambda lr: Loss(4, 2, lr=lr), monitor="val_loss", mode="min")
    best = [min((o for o in result.outcomes if o.stage == k), key=lambda o: o.score) for k in (0, 1)]
    worst = [max((o for o in result.outcomes if o.stage == k), key=lambda o: o.score) for k in (0, 1)]
    assert best != worst
    again = History(Path("tuning"), _search_of(result, "val_loss", "min"))
    again.read()
    assert again.outcomes == list(result.outcomes)


def _search_of(result, monitor, mode):
    from lightning_dp.tuning import Search

    return Search(result.plan, SPACE, monitor, mode, 0)


@pytest.mark.parametrize("fails_at", [0, 7, 16])
def test_an_interrupted_run_is_paid_for_and_made_again(counted, fails_at):
    Counted.fails_at = fails_at
    with pytest.raises(KeyError, match="on fire"):
        search(counted)
    result = search(counted)
    assert Counted.steps == result.num_releases
    assert sum(one.num_steps for one in result.outcomes) <= result.num_releases
    assert pld_epsilon(releases_on_disk(), DELTA) == pytest.approx(TARGET, abs=5e-3)
    assert result.epsilon <= TARGET
    assert sum(n for _, _, n in releases_on_disk()) == Counted.steps


def test_a_search_that_is_interrupted_again_and_again_ends_within_its_budget(counted):
    epsilons = []
    for _ in range(40):
        Counted.fails_at = Counted.steps + 2
        try:
            search(counted, small_epsilons=(0.4, 0.5), num_runs=(1, 1), space=SearchSpace((1, 2), (3, 3)))
        except KeyError:
            epsilons.append(_spent())
        except PrivacyBudgetExceeded:
            break
    else:
        pytest.fail("the budget was never spent")
    assert epsilons == sorted(epsilons)
    assert 0.8 < epsilons[-1] <= TARGET + 5e-3


def _spent():
    """What all journals of the directory tell, joined by hand: one segment for each process, the greatest count."""
    counts = {}
    for path in Path("tuning").glob("privacy-journal-*.json"):
        for name, rows in json.loads(path.read_text())["segments"].items():
            for row in rows:
                key = name, row["noise_multiplier"]
                counts[key] = max(counts.get(key, 0), row["num_releases"])
    return pld_epsilon([(1, noise, n) for (_, noise), n in counts.items() if n], DELTA)


def test_a_finished_search_is_not_made_again(counted):
    first = search(counted)
    steps = Counted.steps
    assert search(counted) == first
    assert Counted.steps == steps


@pytest.mark.slow
def test_a_killed_search_goes_on_with_what_it_has_spent(tmp_path):
    script = (
        "import os, signal\n"
        "from tests.tuning.test_tuner import Counted, search\n"
        "class Killed(Counted):\n"
        "    def on_train_batch_start(self, batch, batch_idx):\n"
        "        if Counted.steps == 12 and not os.path.exists('killed'):\n"
        "            open('killed', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    def on_before_optimizer_step(self, optimizer):\n"
        "        super().on_before_optimizer_step(optimizer)\n"
        "        open('steps', 'a').write('.')\n"
        "print(search(lambda lr: Killed(4, 2, lr=lr)).num_releases)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}

    def run():
        command = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run().returncode == -signal.SIGKILL
    ended = run()
    assert ended.returncode == 0, ended.stderr
    steps = len((tmp_path / "steps").read_text())
    assert steps <= int(ended.stdout.split()[-1]) <= steps + 1
    assert pld_epsilon(releases_on_disk(tmp_path / "tuning"), DELTA) <= TARGET + 5e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"selection": "private"},
            r"selection='private': expected 'public' or a PrivateSelection.*Hold out public data",
        ),
        ({"mode": "best"}, "mode='best': expected 'max' or 'min'"),
        ({"monitor": "f1"}, r"monitor='f1': validation logs \['val_accuracy'\]"),
        ({"strategy": "dp"}, "strategy='dp' of a search: expected a DPStrategy"),
        ({"train": DataLoader(TRAIN, batch_size=60)}, "sample_rate=0.5: expected 1.*batch_size=len"),
        ({"small_epsilons": (0.4, 0.6)}, "small_epsilons=.* leave epsilon"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused_before_anything_is_spent(counted, changes, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        search(counted, **changes)
    assert Counted.steps == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_epsilon": None, "noise_multiplier": 1.0}, "target_epsilon=None of a search: expected a number"),
        ({"target_delta": None}, "target_delta=None of a search: expected a number, below 1/N"),
        ({"noise_multiplier": 1.0}, "noise_multiplier=1.0 of a search: expected none"),
        ({"schedule": [ldp.Stage(3)]}, "schedule=.* of a search: expected none"),
        ({"accountant": "rdp"}, "accountant='rdp' of a search: expected 'prv'"),
    ],
)
def test_strategies_that_do_not_go_with_a_search_are_refused(arguments, message):
    with pytest.raises(PrivacyConfigurationError, match=message):
        search(strategy=strategy(**arguments))


def test_a_used_strategy_is_refused():
    used = strategy()
    search(strategy=used)
    with pytest.raises(PrivacyConfigurationError, match="has made .* releases before: expected a new one"):
        search(strategy=used, directory="other")


def test_another_search_in_the_same_directory_is_refused():
    search()
    with pytest.raises(PrivacyConfigurationError, match="holds another search: seed is now 1 and was 0"):
        search(seed=1)
    Path("tuning/search.json").unlink()
    with pytest.raises(PrivacyConfigurationError, match=r"has the journal of a run, and no search.json"):
        search()


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "search": {}}', '{"version": 1, "search": {}}'])
def test_a_record_that_cannot_be_read_is_not_ignored(text):
    Path("tuning").mkdir()
    Path("tuning/search.json").write_text(text)
    with pytest.raises(PrivacyError, match="cannot be read .* so it is not ignored"):
        search()


def test_a_run_that_ends_early_is_refused_and_stays_spent(counted):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 2

    with pytest.raises(PrivacyError, match="ended after 2 of .* steps"):
        search(counted, trainer={"accelerator": "cpu", "callbacks": Stops()})
    result = search(counted)
    assert result.num_releases == Counted.steps
    assert result.num_releases == sum(one.num_steps for one in result.outcomes) + 2


def test_manual_optimization_is_refused():
    class Manual(LinearHead):
        automatic_optimization = False

    with pytest.raises(PrivacyConfigurationError, match="automatic_optimization=False of Manual in a search"):
        search(lambda lr: Manual(4, 2, lr=lr))


def test_scores_that_are_no_numbers_choose_nothing():
    class Silent(LinearHead):
        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", float("nan"))

    with pytest.raises(PrivacyError, match="no run at epsilon=0.05 has a number as 'val_accuracy'"):
        search(lambda lr: Silent(4, 2, lr=lr))


def test_two_searches_at_once_in_one_directory_are_refused(counted):
    def make(lr):
        with pytest.raises(PrivacyConfigurationError, match="another process is at work on this search"):
            search(counted)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(make)
    assert Counted.steps == 0
    assert search(counted).num_releases == Counted.steps
