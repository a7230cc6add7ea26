"""Every layer of torch that has parameters, over wide ranges of its options, equals the oracle.

The ranges contain those over which Opacus tests its own layers (there a batch may also be empty; here an empty draw is
a phantom sample, which the tests of the strategy cover).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.bookkeeping.cases import CONV, TRANSPOSED, mean_loss
from tests.bookkeeping.oracle import Batch, Case, check

Draw = Callable[[st.SearchStrategy[Any]], Any]

few, flag = st.integers(1, 4), st.booleans()
samples = st.integers(2, 4)
channels = st.sampled_from([1, 3, 8, 32])


def case(layer: nn.Module, batch: Batch, loss: Any = mean_loss) -> Case:
    """Return the case of a layer on a batch, shown by both in a counterexample."""
    sizes = (next(iter(batch.values())).shape[0], 1)
    shapes = {name: tuple(t.shape) for name, t in batch.items()}
    return Case(f"{layer!r} on {shapes}", lambda: layer, lambda: batch, loss, sizes=sizes)


def reals(*shape: int) -> Batch:
    return {"x": torch.randn(shape)}


def ids(vocabulary: int, *shape: int) -> Batch:
    return {"x": torch.randint(0, vocabulary, shape)}


def partly_frozen(draw: Draw, layer: nn.Module) -> nn.Module:
    """Freeze nothing, or one of the layer's parameters."""
    parameters = list(layer.parameters())
    frozen = draw(st.integers(-1, len(parameters) - 1)) if len(parameters) > 1 else -1
    if frozen >= 0:
        parameters[frozen].requires_grad_(False)
    return layer


@st.composite
def linear(draw: Draw) -> Case:
    axes = draw(st.lists(few, max_size=3))
    inputs, outputs = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    layer = partly_frozen(draw, nn.Linear(inputs, outputs, bias=draw(flag)))
    return case(layer, reals(draw(samples), *axes, inputs))


@st.composite
def bilinear(draw: Draw) -> Case:
    left, right, axes, n = draw(few), draw(few), draw(st.lists(few, max_size=2)), draw(samples)
    batch = {"x": torch.randn(n, *axes, left), "z": torch.randn(n, *axes, right)}
    layer = nn.Bilinear(left, right, draw(few), bias=draw(flag))
    return case(layer, batch, lambda m, b: m(b["x"], b["z"]).flatten(1).cos().mean(1).mean())


@st.composite
def convolution(draw: Draw, rank: int) -> Case:
    inputs, kernel = draw(channels), draw(st.tuples(*[st.integers(1, 3)] * rank))
    groups = draw(st.sampled_from([g for g in (1, 2, 8, 32) if inputs % g == 0]))
    dilation, padding = draw(st.integers(1, 2)), draw(st.sampled_from(["same", "valid", 0, 1, 2]))
    size = draw(st.tuples(*[st.integers(*{1: (6, 10), 2: (6, 9), 3: (5, 6)}[rank])] * rank))
    layer = CONV[rank](
        inputs,
        groups * draw(st.sampled_from([1, 2, 3])),
        kernel,
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(flag),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    return case(partly_frozen(draw, layer), reals(draw(samples), inputs, *size))


@st.composite
def transposed_convolution(draw: Draw, rank: int) -> Case:
    inputs, kernel, stride = draw(channels), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([g for g in (1, 2, 8) if inputs % g == 0]))
    dilation, padding, output_padding = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.integers(0, 1))
    assume(output_padding < max(stride, dilation) and dilation * (kernel - 1) + 1 > padding)
    layer = TRANSPOSED[rank](
        inputs, groups * draw(few), kernel, stride, padding, output_padding, groups, draw(flag), dilation
    )
    size = draw(st.tuples(*[st.integers(3, 5)] * rank))
    return case(partly_frozen(draw, layer), reals(draw(samples), inputs, *size))


@st.composite
def embedding(draw: Draw) -> Case:
    vocabulary, axes = draw(st.integers(1, 20)), draw(st.lists(st.integers(1, 5), max_size=3))
    padding = draw(st.none() | st.integers(-vocabulary, vocabulary - 1))
    layer = nn.Embedding(vocabulary, draw(st.integers(1, 10)), padding_idx=padding)
    return case(layer, ids(vocabulary, draw(samples), *axes))


@st.composite
def embedding_bag(draw: Draw) -> Case:
    vocabulary, length, n = draw(st.integers(1, 20)), draw(st.integers(1, 5)), draw(samples)
    layer = nn.EmbeddingBag(
        vocabulary,
        draw(st.integers(1, 6)),
        mode=draw(st.sampled_from(["sum", "mean", "max"])),
        padding_idx=draw(st.none() | st.integers(-vocabulary, vocabulary - 1)),
    )
    batch = ids(vocabulary, n, length)
    if draw(flag):
        return case(layer, batch)
    assume(bool((batch["x"][0] != batch["x"][1]).all()))  # the first two samples tell which rows belong to which

    def with_offsets(m: nn.Module, b: Batch) -> Tensor:
        return m(b["x"].flatten(), torch.arange(len(b["x"])) * length).cos().mean(1).mean()

    return case(layer, batch, with_offsets)


@st.composite
def layer_norm(draw: Draw) -> Case:
    shape, normalized = draw(st.lists(few, max_size=2)), draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    before, affine = nn.Linear(normalized[-1], normalized[-1]), draw(flag)
    layer = nn.LayerNorm(normalized, elementwise_affine=affine, bias=draw(flag))
    return case(nn.Sequential(before, layer), reals(draw(samples), *shape, *normalized))


@st.composite
def rms_norm(draw: Draw) -> Case:
    shape, normalized = draw(st.lists(few, max_size=2)), draw(st.lists(st.integers(2, 5), min_size=1, max_size=2))
    layer = nn.RMSNorm(normalized, elementwise_affine=draw(flag))
    before = nn.Linear(normalized[-1], normalized[-1])
    return case(nn.Sequential(before, layer), reals(draw(samples), *shape, *normalized))


@st.composite
def group_norm(draw: Draw) -> Case:
    groups, each, rank = draw(st.sampled_from([1, 2, 3, 8])), draw(few), draw(st.integers(1, 3))
    size = draw(st.tuples(*[st.integers(2, 4)] * rank))
    layer = nn.GroupNorm(groups, groups * each, affine=draw(flag))
    before = CONV[rank](groups * each, groups * each, 1)
    return case(nn.Sequential(before, layer), reals(draw(samples), groups * each, *size))


@st.composite
def instance_norm(draw: Draw) -> Case:
    rank, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
    size = draw(st.tuples(*[st.integers(2, 5)] * rank))
    model = nn.Sequential(CONV[rank](width, width, 1), kind(width, affine=draw(flag)))
    return case(model, reals(draw(samples), width, *size))


@st.composite
def attention(draw: Draw) -> Case:
    heads, n, queries, keys = draw(few), draw(samples), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    width, first = heads * draw(few), draw(flag)
    kdim, vdim = (draw(few), draw(few)) if draw(flag) else (width, width)
    layer = nn.MultiheadAttention(
        width,
        heads,
        bias=draw(flag),
        add_bias_kv=draw(flag),
        add_zero_attn=draw(flag),
        kdim=kdim,
        vdim=vdim,
        batch_first=first,
    )
    batch = {"q": torch.randn(n, queries, width), "k": torch.randn(n, keys, kdim), "v": torch.randn(n, keys, vdim)}

    def loss(m: nn.Module, b: Batch) -> Tensor:
        inputs = [t if first else t.transpose(0, 1) for t in b.values()]
        out, weights = m(*inputs)
        out = out if first else out.transpose(0, 1)
        return out.cos().mean((1, 2)).mean() + weights.square().mean((1, 2)).mean()

    return case(layer, batch, loss)


@st.composite
def recurrent(draw: Draw) -> Case:
    kind, first = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM])), draw(flag)
    inputs, hidden = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    options = {"proj_size": 1} if kind is nn.LSTM and draw(flag) else {}
    layer = kind(
        inputs,
        hidden,
        draw(st.integers(1, 2)),
        bias=draw(flag),
        batch_first=first,
        bidirectional=draw(flag),
        **options,
    )

    def loss(m: nn.Module, b: Batch) -> Tensor:
        out, state = m(b["x"] if first else b["x"].transpose(0, 1))
        out = out if first else out.transpose(0, 1)
        last = sum(s.square().mean((0, 2)).mean() for s in (state if isinstance(state, tuple) else (state,)))
        return out.cos().mean((1, 2)).mean() + last

    return case(layer, reals(draw(samples), draw(st.integers(1, 6)), inputs), loss)


@st.composite
def prelu(draw: Draw) -> Case:
    width, axes = draw(st.integers(1, 6)), draw(st.lists(few, max_size=2))
    layer = nn.PReLU(width if draw(flag) else 1)
    return case(layer, reals(draw(samples), width, *axes))


LAYERS: dict[str, st.SearchStrategy[Case]] = {
    "linear": linear(),
    "bilinear": bilinear(),
    **{f"convolution {rank}d": convolution(rank) for rank in CONV},
    **{f"transposed convolution {rank}d": transposed_convolution(rank) for rank in TRANSPOSED},
    "embedding": embedding(),
    "embedding bag": embedding_bag(),
    "layer norm": layer_norm(),
    "RMS norm": rms_norm(),
    "group norm": group_norm(),
    "instance norm": instance_norm(),
    "attention": attention(),
    "recurrent": recurrent(),
    "PReLU": prelu(),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        torch.manual_seed(0)
        check(data.draw(LAYERS[layer]))

    holds()


@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_batch_sizes_that_equal_other_sizes(size: int) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm((3, 6)), nn.Conv1d(3, 2, 5), nn.Flatten(), nn.Linear(4, 2))
    check(case(model, reals(size, 3, 5)))
