"""Packed sequences: whose rows are known, and what is refused because they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from lightning_dp.bookkeeping.packing import Packing, packing_of
from lightning_dp.errors import UnsupportedModelError
from tests.bookkeeping.cases import Raw, mean_loss, recurrent_loss
from tests.bookkeeping.oracle import Batch, Case, book_of, check, compare, loss_of, observed, reference, to_dtype
from tests.bookkeeping.recurrent_cases import DEEP, lstm, packed_loss, per_sample, ragged

BY_HAND = [(3, 5, 1, 5), (3, 3, 1, 6), (6, 4, 2, 1)]


def pass_over(model: nn.Module, batch: Batch, loss: Any) -> None:
    """Observe a model and record one pass."""
    case = Case("", lambda: model, lambda: batch, loss)
    batch = to_dtype(batch, torch.float64)
    book_of(case, model, batch, observed(case, model, batch, dict(model.named_parameters()), {}))


def refused(build: Callable[[], nn.Module], batch: Callable[[], Batch], match: str, loss: Any) -> None:
    """Assert that observing a model or recording it is refused."""
    torch.manual_seed(0)
    model, values = build().double(), batch()
    with pytest.raises(UnsupportedModelError, match=match):
        pass_over(model, values, loss)


def test_owners_of_rows() -> None:
    packed = pack_padded_sequence(torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]]), [2, 3, 1], True, False)
    packing = packing_of("lstm", [packed.data, packed.batch_sizes])
    assert packing is not None
    assert [packed.data[packing.rows_of(k)].tolist() for k in range(3)] == [[1, 2], [3, 4, 5], [6]]
    assert packing.problem(3) == ""
    assert "3 sequences for 4 samples" in packing.problem(4)
    assert packing_of("linear", [packed.data, packed.batch_sizes]) is None


def test_a_sequence_that_nobody_holds_has_no_owners() -> None:
    sizes = pack_padded_sequence(torch.ones(2, 3), [3, 3], True).batch_sizes
    found = packing_of("lstm", [None, sizes])
    assert found is not None
    assert "do not come from a PackedSequence" in found.problem(2)
    assert Packing(sizes).problem(2) == ""


@pytest.mark.parametrize("lengths", [(3, 3, 2, 4), (3, 2, 2, 1), (3, 3, 3, 3)])
@pytest.mark.parametrize("layer", [lambda x, m: m.g(x), lambda x, m: x * m.w, lambda x, m: m.e((x > 0).sum(1))])
def test_packed_data_in_another_function(lengths: tuple[int, ...], layer: Callable[..., Tensor]) -> None:
    """Two samples of one length look like two rows of each sample; the next batch has other lengths."""

    def loss(model: Any, batch: Batch) -> Tensor:
        packed = pack_padded_sequence(batch["x"], batch["length"], True, False)
        out = PackedSequence(layer(packed.data, model), *packed[1:])
        return pad_packed_sequence(out, True)[0].cos().sum((1, 2)).mean()

    refused(
        lambda: Raw(None, g=nn.Linear(4, 4), w=torch.ones(4), e=nn.Embedding(5, 4)),
        ragged(*lengths),
        "packed|scale",
        loss,
    )


def by_hand(order: Callable[[Tensor], Any], enforce: bool) -> Callable[..., Tensor]:
    """Return a training step that sorts the samples itself and puts the outputs back in order."""

    def loss(model: Any, batch: Batch) -> Tensor:
        longest_first = order(batch["length"])
        x, lengths = model.g(batch["x"])[longest_first], batch["length"][longest_first]
        out, state = model.f(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce))
        back = torch.empty(len(x), dtype=torch.long)
        back[longest_first] = torch.arange(len(x))
        return per_sample(pad_packed_sequence(out, batch_first=True)[0][back], tuple(s[:, back] for s in state))

    return loss


ORDERS = {
    "argsort": lambda lengths: lengths.argsort(descending=True),
    "sort": lambda lengths: lengths.sort(0, True)[1],
    "topk": lambda lengths: lengths.topk(len(lengths))[1],
}


@pytest.mark.parametrize("lengths", BY_HAND, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("enforce", [True, False])
def test_sorting_by_hand(lengths: tuple[int, ...], order: str, enforce: bool) -> None:
    match = "in another order|packed with enforce_sorted=True|changes what the function computes"
    refused(lambda: Raw(None, f=lstm(), g=nn.Linear(4, 4)), ragged(*lengths), match, by_hand(ORDERS[order], enforce))


@pytest.mark.parametrize("lengths", BY_HAND, ids=str)
@pytest.mark.parametrize("enforce", [True, False])
def test_sorting_by_hand_in_python(lengths: tuple[int, ...], enforce: bool) -> None:
    def in_python(lengths: Tensor) -> list[int]:
        numbers = lengths.tolist()
        return sorted(range(len(numbers)), key=lambda k: -numbers[k])

    match = "in another order|packed with enforce_sorted=True|changes what the function computes"
    refused(lambda: Raw(None, f=lstm(), g=nn.Linear(4, 4)), ragged(*lengths), match, by_hand(in_python, enforce))


def test_sorting_by_hand_as_a_list() -> None:
    """Nothing shows it while the observed sequences are equally long; the first batch of other ones is refused."""

    def loss(model: Any, batch: Batch) -> Tensor:
        sequences = [x[:n] for x, n in zip(batch["x"], batch["length"].tolist(), strict=True)]
        packed = pack_sequence(sorted(sequences, key=len, reverse=True))
        return model(packed)[1][0].cos().sum((0, 2)).mean()

    refused(lstm, ragged(3, 3, 1, 6), "packed with enforce_sorted=True", loss)


def test_one_step_of_every_sample_is_no_other_order() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        packed = pack_padded_sequence(batch["x"], batch["length"], batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(model(packed)[0], batch_first=True)
        return out[torch.arange(len(out)), batch["length"] - 1].cos().sum(1).mean()

    for lengths in ((3, 5, 1, 5), (3, 3, 1, 6)):
        check(Case("last step", lstm, ragged(*lengths), loss))


def test_several_sequences_of_each_sample() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        x, lengths = batch["x"].unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1), batch["length"].repeat_interleave(2)
        return model(pack_padded_sequence(x, lengths, True, False))[1][0].cos().sum((0, 2)).mean()

    refused(lstm, ragged(3, 5, 1, 5), "4 sequences for 2 samples", loss)


def test_function_called_without_a_packed_sequence() -> None:
    def sizes_of(batch: Batch) -> list[Tensor]:
        return list(pack_padded_sequence(batch["x"], batch["length"], True, False)[:2])

    def loss(model: Any, batch: Batch) -> Tensor:
        data, sizes = sizes_of(batch)
        zeros = data.new_zeros(1, len(batch["x"]), 3)
        weights = [p for name, p in model.named_parameters()]
        return torch.lstm(data, sizes, (zeros, zeros), weights, True, 1, 0.0, True, False)[1].cos().sum((0, 2)).mean()

    refused(lstm, ragged(3, 5, 1, 5), "do not come from a PackedSequence", loss)


def test_a_packed_sequence_that_lost_its_order() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        packed = pack_padded_sequence(batch["x"], batch["length"], True, False)
        out, _ = model(PackedSequence(packed.data, packed.batch_sizes))
        return pad_packed_sequence(PackedSequence(out.data, *packed[1:]), True)[0].cos().sum((1, 2)).mean()

    for lengths in ((3, 5, 1, 5), (3, 3, 1, 5)):
        refused(lstm, ragged(*lengths), "do not agree about their order", loss)


def test_packed_where_padded_was_observed() -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        equal = len(set(batch["length"].tolist())) == 1
        return recurrent_loss(model, batch) if equal else packed_loss(model, batch)

    refused(lstm, ragged(3, 3, 1, 5), "or in place of the padded ones", loss)


def test_packed_dropout_that_draws_what_cannot_be_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.bookkeeping.rules.layers.F.dropout", lambda t, p: t)
    refused(lambda: nn.LSTM(4, 3, dropout=0.5, **DEEP), ragged(3, 5, 1, 5), "cannot be drawn once more", packed_loss)


def test_a_sample_that_is_not_finite_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    case = Case("", lambda: nn.LSTM(4, 3, **DEEP).double(), ragged(3, 5, 1, 5), packed_loss)
    model, batch = case.build(), to_dtype(case.batch(), torch.float64)
    named = dict(model.named_parameters())
    keeping = observed(case, model, batch, named, {})
    batch["x"][1, 2, 0] = torch.inf
    book = book_of(case, model, batch, keeping)
    norms, gradients = reference(case, model, batch, named)
    assert not book.norm_sq()[1].isfinite()
    sums = book.weighted_sums(torch.tensor([4.0, 0.0, 4.0, 4.0], dtype=torch.float64))
    for name, g in gradients.items():
        torch.testing.assert_close(sums[name], g[[0, 2, 3]].sum(0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_under_dropout(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case("", lambda: kind(4, 3, dropout=0.5, **DEEP).to(dtype), ragged(3, 5, 1, 5), packed_loss, dtype=dtype)
    model, batch = case.build(), to_dtype(case.batch(), dtype)
    named = dict(model.named_parameters())
    sums = book_of(case, model, batch, observed(case, model, batch, named, {})).weighted_sums(torch.ones(4))
    loss_of(case, model, batch).backward()
    for name, parameter in named.items():
        torch.testing.assert_close(sums[name], parameter.grad)


def test_other_lengths_and_batch_sizes_than_when_observed() -> None:
    torch.manual_seed(0)
    case = Case("", lambda: nn.GRU(4, 3, **DEEP).double(), ragged(3, 5), packed_loss)
    model, batch = case.build(), to_dtype(case.batch(), torch.float64)
    named = dict(model.named_parameters())
    keeping = observed(case, model, batch, named, {})
    for lengths in ((3, 3, 3), (9, 1), (1,), (2, 2, 4, 4, 7, 1, 2)):
        batch = to_dtype(ragged(*lengths)(), torch.float64)
        compare(case, book_of(case, model, batch, keeping), *reference(case, model, batch, named))


def test_only_looked_at() -> None:
    """A refused function is an error only where its gradient is used."""

    def loss(model: Any, batch: Batch) -> Tensor:
        packed = pack_padded_sequence(batch["x"], batch["length"], True, False)
        model.g(packed.data)
        return mean_loss(model.g, batch)

    torch.manual_seed(0)
    pass_over(Raw(None, g=nn.Linear(4, 4)).double(), ragged(3, 3, 2, 4)(), loss)
