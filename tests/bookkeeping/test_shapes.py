"""Linear layers, convolutions and embeddings of many shapes equal the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.bookkeeping.cases import CONV, TRANSPOSED, mean_loss
from tests.bookkeeping.oracle import Case, check

several = settings(max_examples=30, deadline=None, derandomize=True)
few = st.integers(1, 4)


def check_module(module: nn.Module, *shape: int, vocab: int = 0, samples: int = 3) -> None:
    """Check one module on random input."""
    x = torch.randint(0, vocab, (samples, *shape)) if vocab else torch.randn(samples, *shape)
    check(Case("shapes", lambda: module, lambda: {"x": x}, mean_loss, sizes=(samples, 1)))


@several
@given(axes=st.lists(few, max_size=3), inputs=few, outputs=few, bias=st.booleans(), samples=st.integers(2, 4))
def test_linear(axes: list[int], inputs: int, outputs: int, bias: bool, samples: int) -> None:
    check_module(nn.Linear(inputs, outputs, bias=bias), *axes, inputs, samples=samples)


@several
@given(
    rank=st.integers(1, 3), groups=st.integers(1, 2), channels=st.integers(1, 3), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), padding=st.integers(0, 2), size=st.integers(5, 6),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]), samples=st.integers(2, 4),
)  # fmt: skip
def test_convolution(rank: int, groups: int, channels: int, mode: str, size: int, samples: int, **options: Any) -> None:
    kernel = options.pop("kernel")
    module = CONV[rank](2 * groups, channels * groups, kernel, groups=groups, padding_mode=mode, **options)
    check_module(module, 2 * groups, *[size] * rank, samples=samples)


@several
@given(
    rank=st.integers(1, 3), groups=st.integers(1, 2), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    dilation=st.integers(1, 2), padding=st.integers(0, 1), output_padding=st.integers(0, 1),
)  # fmt: skip
def test_transposed_convolution(rank: int, groups: int, kernel: int, **options: int) -> None:
    assume(options["output_padding"] < max(options["stride"], options["dilation"]))
    assume(options["dilation"] * (kernel - 1) + 1 > options["padding"])
    check_module(TRANSPOSED[rank](2 * groups, 3 * groups, kernel, groups=groups, **options), 2 * groups, *[3] * rank)


@several
@given(axes=st.lists(few, max_size=3), rows=st.integers(1, 6), width=few, padding=st.none() | st.integers(-6, 5))
def test_embedding(axes: list[int], rows: int, width: int, padding: int | None) -> None:
    assume(padding is None or -rows <= padding < rows)
    check_module(nn.Embedding(rows, width, padding_idx=padding), *axes, vocab=rows)


@pytest.mark.parametrize("samples", [2, 3, 5, 6])
def test_batch_sizes_that_equal_other_sizes(samples: int) -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm((3, 6)), nn.Conv1d(3, 2, 5), nn.Flatten(), nn.Linear(4, 2))
    check_module(module, 3, 5, samples=samples)
