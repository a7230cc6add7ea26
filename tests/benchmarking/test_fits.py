"""Fits that wait for their turn, in this process: what they count agrees with what their training steps saw."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.benchmarking.baton import Ended
from lightning_dp.benchmarking.configured import ConfiguredFit
from lightning_dp.benchmarking.fits import Variant
from tests.models import Regression, loader
from tests.test_cli import CONFIGS

ROUNDS = 6


class Counting(Regression):
    """Notes the rows of every physical batch."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lr=0.01)
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


class Given:
    """Gives every turn at once, and notes what it is told and what the training steps saw since."""

    def __init__(self, module=None, rounds=ROUNDS):
        self.module, self.rounds = module, rounds
        self.told, self.seen, self.facts, self.imported, self.has_ended = [], [], None, False, False

    def imports_done(self):
        self.imported = True

    def ready(self, facts):
        self.facts = facts

    def wait(self, batches, examples):
        if self.module is not None:
            self.told.append((batches, examples))
            self.seen.append((len(self.module.rows), sum(self.module.rows)))
            self.module.rows = []
        self.rounds -= 1
        if self.rounds < 0:
            self.has_ended = True
            raise Ended


def measured(variant, tmp_path, callbacks=(), data=None, **strategy):
    module = Counting()
    baton = Given(module)
    settings = {
        "accelerator": "cpu",
        "strategy": ldp.DPStrategy(**{"noise_multiplier": 1.0, "max_physical_batch_size": 6, **strategy}),
        "callbacks": [ldp.PrivacyMonitor(summary=False), ldp.PrivacyBudgetStopping(), *callbacks],
        "max_steps": 1,
        "default_root_dir": "elsewhere",
    }
    trainer = variant.trainer(pl.Trainer, settings, str(tmp_path), baton)
    trainer.fit(module, data or loader(n=60, batch_size=20))
    assert baton.has_ended
    return baton, trainer


def test_private_steps_are_counted_as_they_were_drawn(tmp_path):
    baton, _ = measured(Variant(True, steps=ROUNDS), tmp_path)
    # The first turn follows nothing, and the first step also looks at the model.
    assert baton.told[0] == (0, 0)
    assert baton.told[2:] == baton.seen[2:]
    assert len(set(baton.told[2:])) > 1  # draws differ
    facts = baton.facts()
    assert (facts.physical_batch_size, facts.num_physical, facts.device) == (6, 3, "cpu")
    assert facts.num_trained == facts.num_parameters == 3 * 4 + 4 + 4 * 2 + 2


def test_the_ordinary_opponent_has_full_physical_batches_and_as_many_examples(tmp_path):
    private, _ = measured(Variant(True, steps=ROUNDS), tmp_path)
    variant = Variant(True, steps=ROUNDS).against(private.facts())
    assert variant == Variant(False, False, 6, 3, ROUNDS)
    baton, trainer = measured(variant, tmp_path)
    assert baton.told[1:] == baton.seen[1:]
    # Of 60 examples 54 are in an epoch, as Lightning steps at its end, whatever was accumulated.
    assert baton.told[1:] == ROUNDS * [(3, 18)]
    assert trainer.global_step == ROUNDS
    assert not isinstance(trainer.strategy, ldp.DPStrategy)
    assert (baton.facts().physical_batch_size, baton.facts().num_physical) == (6, 3)


def test_users_count_with_their_rows(tmp_path):
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    users = ldp.PrivateDataset(TensorDataset(x, y), user_ids=[i // 2 for i in range(40)], examples_per_user=2)
    baton, _ = measured(Variant(True, steps=ROUNDS), tmp_path, data=DataLoader(users, batch_size=20))
    assert baton.told[2:] == baton.seen[2:]
    assert (baton.facts().physical_batch_size, baton.facts().num_physical) == (6, 3)


def test_a_draw_in_one_batch_has_an_opponent_of_the_expected_size(tmp_path):
    baton, _ = measured(Variant(True, steps=ROUNDS), tmp_path, max_physical_batch_size=50)
    assert (baton.facts().physical_batch_size, baton.facts().num_physical) == (20, 1)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ((), 4 + 2),
        ((ldp.BiasOnlyFinetuning(unfreeze=["net.2"]),), 4 + 4 * 2 + 2),
        ((ldp.BiasOnlyFinetuning(unfreeze=["net.2"], after_epoch=9, learning_rate_factor=2.0),), 4 + 4 * 2 + 2),
    ],
)
def test_biases_alone_are_trained_with_what_the_user_has_unfrozen(private, given, trained, tmp_path):
    baton, _ = measured(Variant(private, True, 6, 3, ROUNDS), tmp_path, given)
    assert baton.facts().num_trained == trained


@pytest.mark.parametrize("private", [True, False])
def test_what_writes_or_ends_a_fit_is_left_out_and_the_rest_runs(private, tmp_path):
    class Own(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            Own.steps += 1

    sent_away = (
        ModelCheckpoint("kept"),
        EarlyStopping("val_loss"),
        LearningRateMonitor(),
        ldp.PrivacyReport(),
        ldp.BiasOnlyFinetuning(),
        ldp.PublicPretraining(switch=0.5),
    )
    baton, trainer = measured(Variant(private, False, 6, 3, ROUNDS), tmp_path, (Own(), *sent_away))
    assert Own.steps >= ROUNDS
    assert not set(sent_away) & set(trainer.callbacks)
    kinds = {type(callback) for callback in trainer.callbacks}
    assert (ldp.PrivacyMonitor in kinds) == (ldp.PrivacyBudgetStopping in kinds) == private
    assert baton.facts().num_trained == baton.facts().num_parameters
    assert list(tmp_path.iterdir()) == []


# ---- of a configuration --------------------------------------------------------------------------------------------

OWN = (f"--config={CONFIGS[0]}", "--trainer.strategy.accountant=rdp", "--data.batch_size=128")


@pytest.fixture(autouse=True)
def _no_command_line_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])


@pytest.mark.parametrize("private", [True, False])
def test_a_configuration_is_fitted_as_it_stands_and_leaves_nothing(private, tmp_path):
    baton = Given(rounds=3)
    arguments = (*OWN, "--trainer.strategy.max_physical_batch_size=32", "--trainer.max_steps=1")
    ConfiguredFit(arguments, Variant(private, False, 32, 4, 3))(baton)
    assert baton.imported
    assert baton.has_ended
    facts = baton.facts()
    assert (facts.physical_batch_size, facts.num_physical) == (32, 4)
    assert facts.num_trained == 64 * 128 + 128 + 128 * 10 + 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("strategy", "name"), [("auto", "auto"), ("SingleDeviceStrategy", "SingleDeviceStrategy")])
def test_a_configuration_without_privacy_is_refused(strategy, name):
    with pytest.raises(
        ldp.PrivacyConfigurationError, match=f"trainer.strategy={name}: expected a private strategy.*DPStrategy"
    ):
        ConfiguredFit((*OWN[:1], f"--trainer.strategy={strategy}"), Variant(True))(Given())
