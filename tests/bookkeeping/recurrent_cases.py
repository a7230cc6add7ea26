"""Recurrent layers and cells, padded and packed, whose book must equal the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.bookkeeping.cases import Raw, mean_loss, rand, reals, recurrent_loss, unrolled
from tests.bookkeeping.oracle import Batch, Case

B = 4
RECURRENT_CASES: list[Case] = []
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN-tanh": nn.RNN,
    "RNN-relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
DEEP = {"num_layers": 2, "bidirectional": True}


def add(name: str, build: Callable[[], nn.Module], batch: Callable[[], Batch], loss: Any, **rest: Any) -> None:
    """Add a case."""
    RECURRENT_CASES.append(Case(name, build, batch, loss, **rest))


def ragged(*lengths: int) -> Callable[[], Batch]:
    """Return sequences of the lengths, padded with numbers that must not matter."""
    return lambda: {"x": torch.randn(len(lengths), max(lengths), 4), "length": torch.tensor(lengths)}


def per_sample(out: Tensor, state: Any) -> Tensor:
    """Return the mean over the samples of a curved function of outputs ``[B, T, k]`` and of the last states."""
    states = state if isinstance(state, tuple) else (state,)
    last = sum(((k + 1) * s).transpose(0, 1).flatten(1).sin().sum(1) for k, s in enumerate(states))
    return ((out.cos() * out.exp()).sum((1, 2)) + last).mean()


def packed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a recurrent layer on packed sequences."""
    layer, first = getattr(model, "f", model), model.batch_first
    x = batch["x"] if first else batch["x"].transpose(0, 1)
    packed = pack_padded_sequence(x, batch["length"], batch_first=first, enforce_sorted=False)
    out, state = layer(packed, *model.states(batch)) if hasattr(model, "states") else layer(packed)
    return per_sample(pad_packed_sequence(out, batch_first=True)[0], state)


# --- padded ---------------------------------------------------------------------------------------------------------
for kind, build in KINDS.items():
    for first in (True, False):
        add(
            f"{kind}-two-layers-bidirectional-batch_first={first}",
            lambda build=build, first=first: build(4, 3, batch_first=first, **DEEP),
            reals(5, 4),
            recurrent_loss,
        )
    add(f"{kind}-float32", lambda build=build: build(4, 3, **DEEP), reals(5, 4), recurrent_loss, dtype=torch.float32)
    if kind != "LSTM":  # for which torch itself needs a CPU that computes in 16 bits
        add(
            f"{kind}-autocast",
            lambda build=build: build(4, 3, **DEEP),
            reals(5, 4),
            recurrent_loss,
            dtype=torch.float32,
            autocast=True,
        )
    for part in ("weight_ih", "weight_hh_l1", "bias_hh_l0", "bias_ih", "weight_hh_l0_reverse"):
        add(
            f"{kind}-{part}-alone",
            lambda build=build: build(4, 3, **DEEP),
            reals(5, 4),
            recurrent_loss,
            trained=lambda name, part=part: part in name,
        )
for options in ({"bias": False}, {"num_layers": 2}, {"bidirectional": True, "batch_first": True}):
    add(
        f"LSTM-projected-{options}",
        lambda options=options: nn.LSTM(4, 3, proj_size=2, **options),
        reals(5, 4),
        recurrent_loss,
    )
add("LSTM-long", lambda: nn.LSTM(4, 3, **DEEP), reals(60, 4), recurrent_loss, dtype=torch.float32)
add("LSTM-one-step", lambda: nn.LSTM(4, 3), reals(1, 4), recurrent_loss)
add("LSTM-bfloat16", lambda: nn.LSTM(4, 3), reals(5, 4), recurrent_loss, dtype=torch.bfloat16, tolerance=5e-2)


class Started(nn.Module):
    """A recurrent layer with an initial state made of trained parameters, or of the samples."""

    batch_first = True

    def __init__(self, kind: type[nn.RNNBase], from_samples: bool = False, directly: bool = False) -> None:
        super().__init__()
        self.f, self.h, self.c = kind(4, 3, batch_first=True, **DEEP), nn.Parameter(rand(4, 1, 3)), None
        self.c = nn.Parameter(rand(4, 1, 3)) if kind is nn.LSTM else None
        self.from_samples, self.directly = from_samples, directly

    def states(self, batch: Batch) -> Any:
        """Return the arguments after the sequences."""
        x = batch["x"]
        h = self.h if self.directly else self.h.expand(-1, len(x), -1).contiguous()
        if self.from_samples:
            h = h * x[:, 0, :3]
        return ((h, self.c.repeat(1, len(x), 1)) if self.c is not None else h,)


def started_loss(model: Any, batch: Batch) -> Tensor:
    """Return the loss of a layer that is given its initial state."""
    return per_sample(*model.f(batch["x"], *model.states(batch)))


for kind in (nn.LSTM, nn.GRU, nn.RNN):
    for from_samples in (False, True):
        build = lambda kind=kind, from_samples=from_samples: Started(kind, from_samples)  # noqa: E731
        label = f"{kind.__name__}-state-{'of-samples' if from_samples else 'of-parameters'}"
        add(label, build, reals(5, 4), started_loss)
        add(f"packed-{label}", build, ragged(2, 5, 3, 5), packed_loss)
add("GRU-state-of-one-sample", lambda: Started(nn.GRU), reals(5, 4), started_loss, sizes=(1,))


def twice_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a layer that is used twice, and for several sequences of each sample."""
    x = batch["x"]
    rows, _ = model(x.flatten(0, 1))
    again, state = model(rows.unflatten(0, x.shape[:2]).mean(1))
    return per_sample(again, state)


add("LSTM-rows-and-reused", lambda: nn.LSTM(4, 4, batch_first=True), reals(3, 5, 4), twice_loss)
add(
    "LSTM-row-first",
    lambda: Raw(lambda m, x: m.f(x.transpose(0, 1).flatten(0, 1))[0].unflatten(0, (3, -1)).transpose(0, 1), f=lstm()),
    reals(3, 5, 4),
    mean_loss,
)


def lstm() -> nn.LSTM:
    """Return a small LSTM."""
    return nn.LSTM(4, 3, batch_first=True)


def normalized(kind: Callable[..., nn.RNNBase], **options: Any) -> nn.Module:
    """Return a layer whose weights are functions of parameters."""
    layer = kind(4, 3, **options)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(layer, name)
    return layer


def loosely(loss: Any) -> Any:
    """Return the same loss; a layer keeps its weights of the last pass, which nobody could copy."""

    def loss_of(model: nn.RNNBase, batch: Batch) -> Tensor:
        value = loss(model, batch)
        model._flat_weights = [None] * len(model._flat_weights)
        return value

    return loss_of


class Dropped(nn.Module):
    """An LSTM with a fixed part of its recurrent weight missing (DropConnect)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = lstm()
        self.raw = nn.Parameter(self.f.weight_hh_l0.detach().clone())
        del self.f._parameters["weight_hh_l0"]
        self.register_buffer("mask", (torch.arange(36).view(12, 3) % 3 != 0).double())

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        weights = [self.f.weight_ih_l0, self.raw * self.mask.to(x), self.f.bias_ih_l0, self.f.bias_hh_l0]
        zeros = x.new_zeros(1, len(x), 3)
        return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, True)[0]


for kind, build in KINDS.items():
    add(f"{kind}-weight-norm", lambda build=build: normalized(build), reals(5, 4), loosely(recurrent_loss))
add("LSTM-drop-connect", Dropped, reals(5, 4), mean_loss)


def tied() -> nn.Module:
    """Return a GRU whose two layers share their weights."""
    layer = nn.GRU(3, 3, 2, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(layer, f"{name}_l1", getattr(layer, f"{name}_l0"))
    return layer


add("GRU-shared-by-layers", tied, reals(5, 3), recurrent_loss)
for reentrant in (False, True):
    add(
        f"LSTM-checkpoint-reentrant={reentrant}",
        lambda reentrant=reentrant: Raw(
            lambda m, x: checkpoint(lambda h: m.f(h)[0], m.g(x), use_reentrant=reentrant), f=lstm(), g=nn.Linear(4, 4)
        ),
        reals(5, 4),
        mean_loss,
    )
add("LSTM-inplace-output", lambda: Raw(lambda m, x: m.f(x)[0].mul_(2), f=lstm()), reals(5, 4), mean_loss)

# --- cells ----------------------------------------------------------------------------------------------------------
for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu")):
    label = getattr(cell, "__name__", "RNNCell").replace("<lambda>", "RNNCell-relu")
    add(
        f"{label}-float32",
        lambda cell=cell: Raw(unrolled, f=cell(4, 3)),
        reals(9, 4),
        mean_loss,
        dtype=torch.float32,
    )
    add(
        f"{label}-rows",
        lambda cell=cell: (
            Raw(lambda m, x: m.f(x.flatten(0, 1)), f=cell(4, 3))
            if cell is not nn.LSTMCell
            else Raw(lambda m, x: torch.cat(m.f(x.flatten(0, 1)), 1).unflatten(0, x.shape[:2]), f=cell(4, 3))
        ),
        reals(2, 4),
        lambda m, b: m(b["x"]).cos().reshape(len(b["x"]), -1).mean(1).mean(),
    )
add(
    "LSTMCell-no-bias-trained-state",
    lambda: Raw(
        lambda m, x: torch.cat(m.f(x, (m.h.expand(len(x), -1), m.c.expand(len(x), -1))), 1),
        f=nn.LSTMCell(4, 3, bias=False),
        h=rand(3),
        c=rand(3),
    ),
    reals(4),
    mean_loss,
)

# --- packed ---------------------------------------------------------------------------------------------------------
LENGTHS = {"ragged": (3, 5, 1, 5), "longest-first": (6, 4, 2, 1), "shortest-first": (1, 2, 3, 6), "equal": (4, 4, 4, 4)}
LENGTHS |= {"equal-when-observed": (3, 3, 1, 6)}
for kind, build in KINDS.items():
    for label in LENGTHS if kind == "LSTM" else ("ragged", "equal-when-observed"):
        lengths = LENGTHS[label]
        for first in (True, False):
            add(
                f"packed-{kind}-{label}-batch_first={first}",
                lambda build=build, first=first: build(4, 3, batch_first=first, **DEEP),
                ragged(*lengths),
                packed_loss,
                dtype=torch.float32 if first else torch.float64,
                sizes=(4, 3, 2, 1),
            )
add("packed-LSTM-projected", lambda: nn.LSTM(4, 3, proj_size=2, **DEEP), ragged(3, 5, 1, 5), packed_loss)
add("packed-LSTM-weight-norm", lambda: normalized(nn.LSTM), ragged(3, 5, 1, 5), loosely(packed_loss))
add(
    "packed-GRU-autocast",
    lambda: nn.GRU(4, 3, **DEEP),
    ragged(3, 5, 1, 5),
    packed_loss,
    dtype=torch.float32,
    autocast=True,
)
add(
    "packed-LSTM-frozen-weights",
    lambda: nn.LSTM(4, 3, **DEEP),
    ragged(3, 5, 1, 5),
    packed_loss,
    trained=lambda name: "bias" in name,
)


def sorted_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss on sequences of one length, packed as they are."""
    packed = pack_padded_sequence(batch["x"], batch["length"], batch_first=True)
    out, state = model(packed)
    return per_sample(pad_packed_sequence(out, batch_first=True)[0], state)


def listed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss on a list of sequences."""
    packed = pack_sequence([x[:n] for x, n in zip(batch["x"], batch["length"].tolist(), strict=True)], False)
    return per_sample(pad_packed_sequence(model(packed)[0], batch_first=True)[0], torch.zeros(1, len(batch["x"]), 1))


add("packed-equal-enforce-sorted", lstm, ragged(4, 4, 4, 4), sorted_loss)
add("packed-list", lstm, ragged(3, 5, 1, 5), listed_loss)


def stacked_loss(model: Any, batch: Batch) -> Tensor:
    """Return the loss of two recurrent layers, one after the other on the same packed sequences."""
    packed = pack_padded_sequence(batch["x"], batch["length"], batch_first=True, enforce_sorted=False)
    out, state = model.g(model.f(packed)[0])
    return per_sample(pad_packed_sequence(out, batch_first=True)[0], state)


add("packed-stacked", lambda: Raw(None, f=lstm(), g=nn.GRU(3, 2)), ragged(3, 5, 1, 5), stacked_loss)


def two_sequences_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of two sequences of every sample, in different orders by their lengths."""
    one = pack_padded_sequence(batch["x"], batch["length"], batch_first=True, enforce_sorted=False)
    other = pack_padded_sequence(batch["x"].flip(1), 6 - batch["length"], batch_first=True, enforce_sorted=False)
    return (model(one)[1][0] * model(other)[1][0]).sum((0, 2)).mean()


def checkpointed_loss(model: Any, batch: Batch) -> Tensor:
    """Return the loss of packed sequences in a checkpoint."""

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(model.f(packed)[0], batch_first=True)[0]

    out = checkpoint(run, model.g(batch["x"]), batch["length"], use_reentrant=False)
    return out.cos().sum((1, 2)).mean()


add("packed-two-sequences", lstm, ragged(3, 5, 1, 5), two_sequences_loss)
add("packed-checkpoint", lambda: Raw(None, f=lstm(), g=nn.Linear(4, 4)), ragged(3, 5, 1, 5), checkpointed_loss)


class Tagger(nn.Module):
    """Embedding, LSTM and output layer: ``[B, T]`` ids to ``[B, T, tags]``, for sequences of given lengths."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(6, 5)
        self.layer = nn.LSTM(4, 3, bidirectional=True, batch_first=True, **options)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits of every token."""
        x = pack_padded_sequence(self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.layer(x)[0], batch_first=True, total_length=ids.shape[1])[0])


def flattened_loss(model: Tagger, batch: Batch) -> Tensor:
    """Return a loss of a tagger whose output layer sees one row for every token of the padded batch."""
    x = pack_padded_sequence(model.embedding(batch["x"]), batch["length"], batch_first=True, enforce_sorted=False)
    out = pad_packed_sequence(model.layer(x)[0], batch_first=True, total_length=batch["x"].shape[1])[0]
    return model.head(out.flatten(0, 1)).unflatten(0, out.shape[:2]).cos().mean((1, 2)).mean()


for lengths in ((3, 5, 1, 5), (5, 5, 1, 3)):
    add(
        f"packed-flattened-output-{lengths}",
        Tagger,
        lambda lengths=lengths: {"x": torch.randint(0, 7, (B, 5)), "length": torch.tensor(lengths)},
        flattened_loss,
    )
