"""``max_physical_batch_size="auto"``: found without a trace, used, shown and recorded; the result is the same."""

import json
import logging
import random
from collections import Counter

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader

import lightning_dp as ldp
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.strategies import fastest, hooks, measuring
from lightning_dp.strategies.fastest import Choice
from lightning_dp.strategies.measuring import fastest_size
from lightning_dp.strategies.memory import HostMemory
from tests.models import Regression, loader, trainer
from tests.strategies.reference import assert_equal, by_hand, network, private_fit, whole
from tests.strategies.test_manual import Manual, one_step
from tests.strategies.test_users import Mean, users


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(fastest, "_ENOUGH_SECONDS", 0.0)


def auto(**settings):
    return ldp.DPStrategy(**{"noise_multiplier": 1.0, "max_physical_batch_size": "auto", **settings})


class Sizes(Regression):
    """Notes the sizes of its batches, outside of what is put back."""

    def __init__(self, net=None):
        super().__init__(net)
        self._sizes = []

    def training_step(self, batch, batch_idx):
        self._sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def found(monkeypatch, *sizes):
    """Let the search return these sizes, one after the other, without trying any; return how often it was asked."""
    asked = []

    def search(bench, most):
        asked.append(most)
        return Choice(sizes[min(len(asked), len(sizes)) - 1], "said the test")

    monkeypatch.setattr(measuring, "fastest", search)
    return asked


def observed(monkeypatch, look):
    """Have ``look(strategy)`` called before and after every search, and return what it returned."""
    seen = []

    def search(prepared, step):
        seen.append(look(step.module.trainer.strategy))
        choice = fastest_size(prepared, step)
        seen.append(look(step.module.trainer.strategy))
        return choice

    monkeypatch.setattr(hooks, "fastest_size", search)
    return seen


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_update_is_that_of_a_loop_by_hand(optimizer):
    def settings():
        return Regression(network(), optimizer=optimizer, lr=0.1)

    module, fixed = settings(), settings()
    expected = by_hand(settings(), whole(48))
    fit = private_fit(module, whole(48), strategy={"max_physical_batch_size": "auto"})
    private_fit(fixed, whole(48), strategy={"max_physical_batch_size": 7})
    assert_equal(module, expected, 1e-10)
    assert_equal(fixed, expected, 1e-10)
    assert fit.strategy._run.loader.max_physical_batch_size in (1, 2, 4, 8, 16, 32, 48)


class Trail(Regression):
    """Leaves a trail wherever a training step can."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
        self.register_buffer("steps", torch.zeros(()))
        self.count, self.outputs = 0, []
        self.metric = torchmetrics.MeanMetric()
        self._hooks, self._ran = Counter(), Counter()

    def training_step(self, batch, batch_idx):
        self._ran["training_step"] += 1
        self.steps += 1
        self.count += 1
        random.random(), np.random.rand()
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        self.metric.update(loss.detach())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


for _name in ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_train_batch_start"):
    setattr(Trail, _name, lambda self, *_, _name=_name: self._hooks.update([_name]))


def state_of(strategy):
    """All that a search must leave alone, as numbers that can be compared."""
    module, run, fit = strategy.lightning_module, strategy._run, strategy.lightning_module.trainer
    generators = RandomState.of_all()
    return {
        "parameters and buffers": {n: v.tolist() for n, v in module.state_dict().items()},
        "gradients": [p.grad for p in module.parameters()],
        "types": [type(p) for p in module.parameters()],
        "attributes": (module.count, list(module.outputs), dict(module._hooks), sorted(vars(module))),
        "metric": (module.metric._update_count, float(module.metric.mean_value)),
        "generators": (generators.cpu.tolist(), generators.python, [str(part) for part in generators.numpy]),
        "draws": str(run._sampling._cpu.bit_generator.state),
        "noise": str(run._noise._cpu.bit_generator.state),
        "released": (run.ledger.num_releases, run.budget.step, run.epsilon),
        "trainer": (fit.global_step, dict(fit.callback_metrics), fit.fit_loop.epoch_loop.batch_progress.state_dict()),
        "optimizer": (fit.optimizers[0].state_dict(), fit.lr_scheduler_configs[0].scheduler.state_dict()),
        "training": [m.training for m in module.modules()],
        "statistics": str(run.statistics and vars(run.statistics)),
    }


@pytest.mark.parametrize("statistics", [False, True])
def test_the_search_leaves_no_trace(monkeypatch, statistics):
    module, runs = Trail(), []

    def look(strategy):
        runs.append(module._ran["training_step"])
        return state_of(strategy)

    seen = observed(monkeypatch, look)
    fit = trainer(auto(self_check=False, private_statistics=statistics), max_steps=2)
    fit.fit(module, loader())
    before, after = seen
    assert runs[1] > runs[0] + 20
    for name, value in before.items():
        assert after[name] == value, name
    assert before["released"][0] == 0
    assert fit.strategy.num_releases == 2
    assert module.count == int(module.steps) > 0


# --- where the size goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_all_draws_are_divided_by_the_size_that_was_found(monkeypatch, workers):
    asked = found(monkeypatch, 3)
    module = Sizes()
    data = loader(n=40, batch_size=20, num_workers=workers)
    fit = trainer(auto(self_check=False), max_steps=4, max_epochs=2)
    fit.fit(module, data)
    assert len(asked) == 1
    assert 20 + 3 * (20 * 0.5) ** 0.5 <= asked[0] <= 20 + 3 * (20 * 0.5) ** 0.5 + 1
    in_fit = module._sizes[-4 * 4 :]
    assert max(in_fit) == 3
    assert fit.strategy._run.record().sampler.max_physical_batch_size == 3


def test_one_line_says_what_was_found(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(auto(), max_steps=1).fit(Regression(), loader())
    (line,) = [m for m in caplog.messages if m.startswith("Physical batches of")]
    assert "per example" in line
    assert "would" in line or "no logical batch is larger" in line


def test_a_report_says_what_was_found(monkeypatch, tmp_path):
    found(monkeypatch, 3)
    trainer(auto(), max_steps=1, callbacks=[ldp.PrivacyReport()]).fit(Regression(), loader())
    report = json.loads((tmp_path / "privacy_report.json").read_text())
    assert report["record"]["sampler"]["max_physical_batch_size"] == 3
    assert "at most 3 examples" in (tmp_path / "privacy_report.md").read_text()


def test_a_plan_shows_it_and_spends_nothing(capsys):
    dp = auto()
    plan = ldp.plan(trainer(dp), Regression(), loader())
    assert not plan.is_refused
    assert plan.physical_batch.startswith(f"Physical batches of {plan.physical_batch_size} ")
    assert plan.timed_samples == plan.physical_batch_size
    assert f"at most {plan.physical_batch_size}" in capsys.readouterr().out
    assert dp.num_releases == 0


def test_a_plan_of_what_is_refused_says_so():
    class Coupled(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] - batch[0].mean(0), batch[1]), batch_idx)

    plan = ldp.plan(trainer(auto()), Coupled(), loader(), show=False)
    assert plan.is_refused
    assert plan.physical_batch == ""
    assert plan.physical_batch_size == 5  # the dataloader's batch size


class Large(Regression):
    """Takes a branch for batches of more than five samples, which no look at a few samples sees."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        return F.mse_loss(self.other(out) if len(x) > 5 else out, y)


def test_a_branch_that_no_look_sees_is_refused_in_a_plan_and_in_a_fit():
    data = loader(n=40, batch_size=20)
    plan = ldp.plan(trainer(auto()), Large(), data, show=False)
    with pytest.raises(ldp.UnsupportedModelError) as caught:
        trainer(auto()).fit(Large(), data)
    assert plan.is_refused
    assert str(caught.value) in plan.errors
    assert "other" in str(caught.value)


def test_it_is_found_again_for_other_parameters_and_another_fit_only(monkeypatch):
    class Unfreezing(Sizes):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 1)

    asked = found(monkeypatch, 2, 3, 4)
    module = Unfreezing(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    dp = auto(self_check=False, changed_settings="new_phase")
    sizes = []

    class Note(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            sizes.append((len(asked), max(pl_module._sizes[-2:])))

    data = loader(n=20, batch_size=20)
    fit = trainer(
        dp,
        max_epochs=4,
        max_steps=-1,
        callbacks=[Note()],
        reload_dataloaders_every_n_epochs=1,
        enable_checkpointing=False,
    )
    fit.fit(module, data)
    assert sizes == [(1, 2), (1, 2), (2, 3), (2, 3)]
    fit.fit_loop.max_epochs = 5
    fit.fit(module, data)
    assert sizes[-1] == (3, 4)


def test_users_are_counted_in_users(monkeypatch):
    asked = found(monkeypatch, 2)
    seen = []

    class Rows(Mean):
        def training_step(self, batch, *args):
            seen.append(len(batch[0]))
            return super().training_step(batch, *args)

    dp = auto(self_check=False)
    data = users(3, batch_size=15)
    trainer(dp, max_steps=2).fit(Rows(), data)
    assert asked[0] <= dp._run.loader.units.num_units
    assert set(seen[-2:]) <= {3, 6}
    assert dp._run.loader.max_physical_batch_size == 2


def test_users_are_tried_with_all_their_rows():
    dp = auto()
    trainer(dp, max_steps=1).fit(Mean(), users(3))
    assert dp.num_releases == 1


@pytest.mark.parametrize(
    ("module", "settings", "size"),
    [(Regression, {"clipping_engine": "loop"}, 1), (lambda: Manual(one_step), {}, 20)],
    ids=["loop", "manual"],
)
def test_where_there_is_nothing_to_find(monkeypatch, module, settings, size):
    monkeypatch.setattr(hooks, "fastest_size", None)  # would raise
    dp = auto(**settings)
    trainer(dp, max_steps=1).fit(module(), loader(batch_size=20))
    assert dp._run.loader.max_physical_batch_size == size


# --- what is tried --------------------------------------------------------------------------------------------------


class Limited(Sizes):
    """Runs out of memory above some samples."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error = most, error

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > self.most:
            self._sizes.append(len(batch[0]))
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError("Unable to allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_model_that_runs_out_of_memory_is_trained_in_smaller_batches(error):
    module, dp = Limited(4, error), auto(self_check=False)
    trainer(dp, max_steps=2).fit(module, loader(n=40, batch_size=20))
    assert dp.num_releases == 2
    assert dp._run.loader.max_physical_batch_size in (1, 2, 4)
    assert max(module._sizes) <= 8  # tried once, at the most
    assert all(p.isfinite().all() for p in module.parameters())


def test_memory_that_ends_with_every_size_leaves_one_sample(monkeypatch):
    choices = []

    class Bench(measuring.TrainingBench):
        def _run(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measuring, "TrainingBench", Bench)
    monkeypatch.setattr(hooks, "rank_zero_info", choices.append)
    dp = auto()
    trainer(dp, max_steps=1).fit(Regression(), loader())
    assert choices == ["Physical batches of 1 example: even one ran out of memory when it was tried."]
    assert (dp._run.loader.max_physical_batch_size, dp.num_releases) == (1, 1)


def test_another_error_is_told():
    module = Limited(4, RuntimeError("this model takes up to four"))
    with pytest.raises(RuntimeError, match="this model takes up to four"):
        trainer(auto(self_check=False)).fit(module, loader(n=40, batch_size=20))


def test_little_memory_keeps_batches_small(monkeypatch):
    """Of 15 MB four fifths may be used, and each sample needs 1.2 MB at least."""

    class Wide(Sizes):
        def training_step(self, batch, batch_idx):
            self._sizes.append(len(batch[0]))
            x, y = batch
            wide = self.net(x)[:, :1].expand(-1, 300_000).exp()
            return F.mse_loss(wide.mean(1), y[:, 0])

    monkeypatch.setattr(HostMemory, "free", lambda self: 15_000_000)
    module, dp = Wide(), auto(self_check=False)
    trainer(dp, max_steps=1).fit(module, loader(n=64, batch_size=64))
    assert dp._run.loader.max_physical_batch_size <= 12 / 1.2
    assert max(module._sizes) <= 12 / 1.2


def test_memory_that_is_not_told(monkeypatch, caplog):
    monkeypatch.setattr(measuring, "memory_of", lambda device: None)
    dp = auto()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(dp, max_steps=1).fit(Regression(), loader())
    assert dp._run.loader.max_physical_batch_size == 5
    assert (
        "Physical batches of 5 examples: as without 'auto', since what memory is free on device 'cpu' cannot be found "
        "out here." in caplog.messages
    )


def test_memory_is_that_of_the_longest_sample(monkeypatch):
    samples = [torch.ones(n) for n in (1, 7, 3, 2, 5, 1, 2, 9, 4, 1)]
    weighed = []

    class Padded(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            weighed.append(tuple(batch.shape)) if measured["now"] else None
            return self.net(batch[..., None]).square().mean((1, 2)).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    measured = {"now": False}
    peak_of = HostMemory.peak_of

    def noted(self, action):
        measured["now"] = True
        try:
            return peak_of(self, action)
        finally:
            measured["now"] = False

    monkeypatch.setattr(HostMemory, "peak_of", noted)
    data = DataLoader(samples, batch_size=8, collate_fn=lambda s: nn.utils.rnn.pad_sequence(s, batch_first=True))
    trainer(auto(self_check=False, target_delta=0.01), max_steps=1).fit(Padded(), data)
    assert weighed[:2] == [(1, 9), (2, 9)]
    assert {length for _, length in weighed} == {9}


def test_a_branch_that_is_only_taken_when_sizes_are_tried_is_observed(monkeypatch):
    late = {"now": False}

    class Branching(Sizes):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            out = self.net(x)
            return F.mse_loss(self.other(out) if late["now"] else out, y)

    seen = observed(monkeypatch, lambda strategy: late.update(now=True))
    dp = auto()
    trainer(dp, max_steps=2).fit(Branching(), loader())
    assert len(seen) == 2
    assert dp.num_releases == 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # which Lightning says once in a process
def test_steps_without_a_loss_are_tried_too():
    class Skipping(Sizes):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if len(batch[0]) == 4 else loss

    dp = auto(self_check=False)
    trainer(dp, max_steps=2).fit(Skipping(), loader(n=40, batch_size=20))
    assert dp.num_releases == 2


def test_a_spent_budget_is_told_before_anything_is_tried(monkeypatch):
    dp = auto(target_epsilon=1.0, noise_multiplier=None)
    fit = trainer(dp, max_steps=2)
    fit.fit(Regression(), loader())
    monkeypatch.setattr(hooks, "fastest_size", None)  # would raise
    fit.fit_loop.epoch_loop.max_steps = 1000
    with pytest.raises(ldp.PrivacyError, match="would exceed target_epsilon"):
        fit.fit(Regression(), loader())


@pytest.mark.parametrize("value", ["Auto", "fast", "", "8", True])
def test_other_words(value):
    with pytest.raises(ldp.PrivacyConfigurationError, match=f"max_physical_batch_size={value!r}: expected .* 'auto'"):
        ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=value)
