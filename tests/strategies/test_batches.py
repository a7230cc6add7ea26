"""Whatever a batch is made of and however it is moved, padded or changed: the fit equals one by hand."""

import copy
from collections import Counter, namedtuple
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_dp as ldp
from tests.models import clipped_mean, loader, parameters, trainer
from tests.strategies.reference import Regression, assert_equal, by_hand, network, private_fit, whole

Pair = namedtuple("Pair", ["inputs", "target"])


@dataclass
class Example:
    inputs: torch.Tensor
    target: torch.Tensor


class Shaped(Dataset):
    """The samples of ``whole()``, in another form."""

    def __init__(self, form):
        self.tensors, self.form = whole().dataset.tensors, form

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return self.form(*(t[index] for t in self.tensors))


class Reads(Regression):
    """Reads inputs and target from a batch of any form."""

    def __init__(self, read):
        super().__init__(network())
        self.read = read

    def training_step(self, batch, batch_idx):
        return super().training_step(self.read(batch), batch_idx)


def stacked(examples):
    return Example(torch.stack([e.inputs for e in examples]), torch.stack([e.target for e in examples]))


@pytest.mark.parametrize(
    ("form", "read", "collate"),
    [
        (lambda x, y: [x, y], lambda b: b, None),
        (lambda x, y: {"x": x, "y": y, "name": "a"}, lambda b: (b["x"], b["y"]), None),
        (
            lambda x, y: {"in": {"a": x[:1], "b": [x[1:]]}, "y": y},
            lambda b: (torch.cat([b["in"]["a"], *b["in"]["b"]], 1), b["y"]),
            None,
        ),
        (Pair, lambda b: (b.inputs, b.target), None),
        (Example, lambda b: (b.inputs, b.target), stacked),
        (lambda x, y: torch.cat([x, y]), lambda b: (b[:, :3], b[:, 3:]), None),
        (lambda x, y: (x.numpy(), y.tolist()), lambda b: (b[0], torch.stack(b[1], 1).double()), None),
    ],
    ids=["list", "dict", "nested", "namedtuple", "dataclass", "tensor", "numpy and floats"],
)
def test_forms_of_a_batch(form, read, collate):
    module = Reads(read)
    expected = by_hand(Regression(network()), whole())
    private_fit(module, DataLoader(Shaped(form), batch_size=12, shuffle=True, collate_fn=collate))
    assert_equal(module, expected)


# --- padding --------------------------------------------------------------------------------------------------------

LENGTHS = [1, 4, 2, 3, 3, 1, 5, 2, 4, 1, 2, 3]


class Sequences(pl.LightningModule):
    """Regression on the mean of a padded sequence's embedded tokens."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)
        ).double()

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        return ldp.per_sample_mean((self.net(ids)[..., 0] - ids).square(), mask)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def padded(samples):
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    return ids, ids > 0


def test_a_collate_function_that_pads_to_the_longest():
    g = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 9, (n,), generator=g) for n in LENGTHS]
    module = Sequences()
    expected = copy.deepcopy(module)
    stepper = expected.configure_optimizers()
    for _ in range(3):
        mean = clipped_mean(expected, lambda i: padded([samples[i]]), len(samples))
        for name, p in expected.named_parameters():
            p.grad = mean[name]
        stepper.step()
    private_fit(module, DataLoader(samples, batch_size=12, shuffle=True, collate_fn=padded))
    assert_equal(module, parameters(expected))


# --- data modules and hooks of the transfer -------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def train_dataloader(self):
        self.calls["train_dataloader"] += 1
        return whole()

    def val_dataloader(self):
        return [whole(shuffle=False), loader(dtype=torch.float64, shuffle=False)]


def test_a_data_module():
    class Several(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    module, data = Several(network()), Data()
    expected = by_hand(Regression(network()), whole())
    fit = trainer(ldp.DPStrategy(noise_multiplier=0), max_steps=3, reload_dataloaders_every_n_epochs=1)
    fit.fit(module, datamodule=data)
    assert_equal(module, expected)
    assert data.calls["train_dataloader"] == 3
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= set(fit.callback_metrics)


class Transfers:
    """Every hook of the transfer changes the batch, so that one left out or run twice would show."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        x, y = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return [x * 2, y]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 3, batch[1]]


class TransferringModule(Transfers, Regression):
    pass


class TransferringData(Transfers, Data):
    pass


@pytest.mark.parametrize("physical", [1, 5, 12])
@pytest.mark.parametrize("where", ["module", "data module"])
def test_hooks_of_the_transfer_run_once_for_every_physical_batch(where, physical):
    x, y = whole().dataset.tensors
    changed = DataLoader(TensorDataset((x + 1) * 2 - 3, y), batch_size=12)
    expected = by_hand(Regression(network()), changed)
    dp = ldp.DPStrategy(noise_multiplier=0, max_physical_batch_size=physical)
    fit = trainer(dp, max_steps=3, limit_val_batches=0)
    if where == "module":
        module = TransferringModule(network())
        fit.fit(module, whole())
    else:
        module = Regression(network())
        fit.fit(module, datamodule=TransferringData())
    assert_equal(module, expected)


# --- loaders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_last": True},
        {"pin_memory": False, "timeout": 0},
        {"shuffle": False},
        {"num_workers": 1},
        {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4},
        {"generator": torch.Generator().manual_seed(3)},
    ],
    ids="-".join,
)
def test_settings_of_a_loader(settings):
    module = Regression(network())
    expected = by_hand(module, whole())
    private_fit(module, whole(**settings))
    assert_equal(module, expected)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "sequential", "max_size"])
def test_a_combined_loader_is_refused(mode):
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.PrivacyConfigurationError, match="of several: expected one DataLoader"):
        trainer(dp).fit(Regression(), CombinedLoader({"a": loader(), "b": loader()}, mode))
    assert dp.num_releases == 0


def test_a_combined_loader_of_one_is_refused_too():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.PrivacyConfigurationError, match="expected one DataLoader"):
        trainer(dp).fit(Regression(), CombinedLoader([loader()]))
    assert dp.num_releases == 0


def test_the_same_sample_twice_in_the_dataset_is_two_samples():
    x, y = whole(n=1).dataset.tensors
    twice = DataLoader(TensorDataset(x.repeat(2, 1), y.repeat(2, 1)), batch_size=2)
    module = Regression(network())
    expected = by_hand(module, twice)
    private_fit(module, twice)
    assert_equal(module, expected)
