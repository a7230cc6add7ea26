"""A tagger on packed sequences of different lengths through a Trainer, against a per-sample loop."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

import lightning_dp as ldp
from tests.bookkeeping.recurrent_cases import Tagger
from tests.models import clipped_mean, trainer


class LitTagger(pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.net = Tagger(**options)

    def training_step(self, batch, batch_idx):
        ids, lengths, tags = batch
        loss = F.cross_entropy(self.net(ids, lengths).mT, tags, reduction="none", ignore_index=-100)
        return ldp.per_sample_mean(loss, tags != -100)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SortedByHand(LitTagger):
    """The same, but the training step sorts the embedded sequences and puts the outputs back."""

    def training_step(self, batch, batch_idx):
        ids, lengths, tags = batch
        order = torch.tensor(sorted(range(len(ids)), key=lambda k: -int(lengths[k])))
        x = pack_padded_sequence(self.net.embedding(ids)[order], lengths[order], batch_first=True)
        out = pad_packed_sequence(self.net.layer(x)[0], batch_first=True)[0][order.argsort()]
        loss = F.cross_entropy(self.net.head(out).mT, tags, reduction="none", ignore_index=-100)
        return ldp.per_sample_mean(loss, tags != -100)


def collate(samples):
    longest = max(map(len, samples))
    ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids in samples])
    tags = torch.stack([F.pad(ids % 5, (0, longest - len(ids)), value=-100) for ids in samples])
    return ids, torch.tensor(list(map(len, samples))), tags


def sentences(*lengths):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 7, (n,), generator=g) for n in lengths]


LENGTHS = {"ragged": (3, 7, 1, 5, 5, 2, 6, 4), "equal-where-observed": (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1, 9)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}], ids=str)
def test_one_step(lengths, options):
    torch.manual_seed(0)
    module, data = LitTagger(**options), sentences(*lengths)
    exact = copy.deepcopy(module).double()
    expected = clipped_mean(exact, lambda i: collate([data[i]]), len(data), max_grad_norm=0.5)
    strategy = ldp.DPStrategy(noise_multiplier=0, max_grad_norm=0.5, max_physical_batch_size=3)
    trainer(strategy, max_steps=1).fit(module, DataLoader(data, batch_size=len(data), collate_fn=collate, shuffle=True))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_sequences_packed_by_the_collate_function():
    class Classifier(LitTagger):
        def training_step(self, batch, batch_idx):
            packed, y = batch
            return F.cross_entropy(self.net.layer(packed)[1][0][-1], y)

    def packing(samples):
        return pack_sequence([x for x, _ in samples], enforce_sorted=False), torch.stack([y for _, y in samples])

    torch.manual_seed(0)
    data = [(torch.randn(n, 4), torch.tensor(n % 3)) for n in LENGTHS["ragged"]]
    module = Classifier()
    expected = clipped_mean(module, lambda i: packing([data[i]]), len(data), max_grad_norm=0.3)
    strategy = ldp.DPStrategy(noise_multiplier=0, max_grad_norm=0.3, max_physical_batch_size=3)
    trainer(strategy, max_steps=1).fit(module, DataLoader(data, batch_size=len(data), collate_fn=packing, shuffle=True))
    for name, parameter in module.net.layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"net.layer.{name}"], rtol=1e-4, atol=1e-6)


def test_a_collate_function_that_sorts_is_refused_with_the_way_out():
    def longest_first(samples):
        return collate(sorted(samples, key=len, reverse=True))

    class Sorted(LitTagger):
        def training_step(self, batch, batch_idx):
            ids, lengths, _ = batch
            packed = pack_padded_sequence(self.net.embedding(ids), lengths, batch_first=True)
            return self.net.layer(packed)[1][0].square().sum((0, 2)).mean()

    data = sentences(*LENGTHS["ragged"])
    with pytest.raises(ldp.UnsupportedModelError, match="enforce_sorted=False"):
        trainer(ldp.DPStrategy(noise_multiplier=1.0)).fit(
            Sorted(), DataLoader(data, batch_size=4, collate_fn=longest_first, shuffle=True)
        )


def test_dropout_between_layers_trains():
    strategy = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=3)
    data = sentences(*LENGTHS["ragged"])
    module = LitTagger(num_layers=2, dropout=0.5)
    trainer(strategy, max_steps=2).fit(module, DataLoader(data, batch_size=4, collate_fn=collate, shuffle=True))
    assert strategy.num_releases == 2


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_sorting_by_hand_is_refused(lengths):
    data = sentences(*lengths)
    strategy = ldp.DPStrategy(noise_multiplier=0, max_physical_batch_size=len(data))
    with pytest.raises(ldp.UnsupportedModelError, match="enforce_sorted=False|another sample of the batch"):
        trainer(strategy).fit(SortedByHand(), DataLoader(data, batch_size=len(data), collate_fn=collate, shuffle=True))
