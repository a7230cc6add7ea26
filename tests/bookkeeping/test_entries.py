"""Ghost norms, inner products and sums of entries equal those of the materialised gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.entries import Dense, Entry
from lightning_dp.bookkeeping.pairs import inner
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.bookkeeping.tables import Rows

B, V, D = 3, 6, 5

ENTRIES: dict[str, Callable[[], Entry]] = {
    "dense": lambda: Dense(torch.randn(B, V, D).double()),
    "outer": lambda: Outer(torch.randn(B, 4, D).double(), torch.randn(B, 4, V).double()),
    "outer-long": lambda: Outer(torch.randn(B, 200, D).double(), torch.randn(B, 200, V).double()),
    "rows": lambda: Rows(torch.randint(0, V, (B, 7)), torch.randn(B, 7, D).double(), V),
}


def outer_dense(entry: Entry) -> Tensor:
    """Return the gradients of an entry by their definition."""
    if isinstance(entry, Outer):
        return torch.einsum("btp,btd->bpd", entry.g, entry.a)
    if isinstance(entry, Rows):
        dense = torch.zeros(B, V, D, dtype=entry.g.dtype)
        for i, t in itertools.product(range(B), range(entry.index.shape[1])):
            dense[i, entry.index[i, t]] += entry.g[i, t]
        return dense
    return entry.dense()


@pytest.mark.parametrize("kind", ENTRIES)
def test_norm_and_sum_equal_the_materialised(kind: str) -> None:
    torch.manual_seed(0)
    entry, weight = ENTRIES[kind](), torch.rand(B).double()
    dense = outer_dense(entry)
    torch.testing.assert_close(entry.norm_sq(), dense.flatten(1).square().sum(1))
    torch.testing.assert_close(entry.weighted_sum(weight), torch.tensordot(weight, dense, 1))
    torch.testing.assert_close(entry.dense(), dense)
    torch.testing.assert_close(entry.weighted_sum(weight), torch.tensordot(weight, dense, 1))
    assert tuple(entry.shape) == (V, D)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(ENTRIES, ENTRIES)))
def test_inner_products_and_norms_of_several_entries(one: str, other: str) -> None:
    torch.manual_seed(0)
    e, f = ENTRIES[one](), ENTRIES[other]()
    expected = (outer_dense(e) * outer_dense(f)).flatten(1).sum(1)
    torch.testing.assert_close(inner(e, f), expected)
    book = Book(B)
    for entry in (e, f):
        book.file("w", entry)
    total = outer_dense(e) + outer_dense(f)
    torch.testing.assert_close(book.norm_sq(), total.flatten(1).square().sum(1))
    torch.testing.assert_close(book.weighted_sums(torch.ones(B))["w"], total.sum(0))


def test_entries_of_one_parameter_are_put_together() -> None:
    torch.manual_seed(0)
    kinds = ["dense", "outer", "rows", "outer-long", "outer", "dense", "outer"]
    entries, book = [ENTRIES[kind]() for kind in kinds], Book(B)
    for entry in entries:
        book.file("w", entry)
    book.carry()
    total = torch.stack([outer_dense(e) for e in entries]).sum(0)
    torch.testing.assert_close(book.norm_sq(), total.flatten(1).square().sum(1))
    torch.testing.assert_close(book.weighted_sums(torch.ones(B))["w"], total.sum(0))
    assert len(book.entries["w"]) == 3, "one of each kind"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1])
@pytest.mark.parametrize("positions", [2, 8, 40])
def test_a_norm_that_cancels_is_not_below_what_is_added(scale: float, positions: int) -> None:
    """Half of the positions undo the other half up to ``scale``: a Gram sum in float32 would lose the rest."""
    torch.manual_seed(0)
    half = positions // 2
    a, g = torch.randn(B, half, 50), torch.randn(B, half, 60)
    a, g = torch.cat([a, a], 1), torch.cat([g, -g * (1 + scale)], 1)
    book = Book(B)
    book.file("w", Outer(a, g))
    for i in range(B):
        alone = torch.zeros(B)
        alone[i] = 1
        added = book.weighted_sums(alone)["w"].double().norm()
        found = book.norm_sq()[i].double().sqrt()
        assert float(found) >= float(added) * (1 - 1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-5, 1e-3, 1e-2, 0.1])
def test_uses_that_cancel_each_other(scale: float) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(B, 4, 50), torch.randn(B, 4, 60)
    book = Book(B)
    book.file("w", Outer(a, g))
    book.file("w", Outer(a, -g * (1 + scale)))
    for i in range(B):
        added = book.weighted_sums(torch.eye(B)[i])["w"].double().norm()
        assert float(book.norm_sq()[i].double().sqrt()) >= float(added) * (1 - 1e-4)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sample_of_weight_zero_adds_exact_zeros(kind: str, poison: float) -> None:
    torch.manual_seed(0)
    clean = ENTRIES[kind]()
    expected = torch.tensordot(torch.tensor([1.0, 0.0, 2.0]).double(), outer_dense(clean), 1)
    clean.g[1, 0] = poison
    book = Book(B)
    book.file("w", clean)
    norms = book.norm_sq()
    assert not norms[1].isfinite()
    assert norms[[0, 2]].isfinite().all()
    torch.testing.assert_close(book.weighted_sums(torch.tensor([1.0, 0.0, 2.0]))["w"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    entry = Outer(torch.ones(1, 3000, 1, dtype=dtype), torch.ones(1, 3000, 1, dtype=dtype))
    assert float(entry.norm_sq()) == 9e6
    assert entry.weighted_sum(torch.ones(1)).dtype == torch.float32


def test_entries_hold_no_graph() -> None:
    a, g = torch.randn(B, 4, D, requires_grad=True), torch.randn(B, 4, V)
    assert not Outer(a, g).norm_sq().requires_grad
    assert not Dense(a).weighted_sum(torch.ones(B)).requires_grad


def test_empty_book() -> None:
    assert Book(B).norm_sq().tolist() == [0.0] * B
    assert Book(B).weighted_sums(torch.ones(B)) == {}


@pytest.mark.parametrize("samples", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_products_whose_positions_lie_closest_together(samples: int, dtype: torch.dtype) -> None:
    """As of a convolution of kernel size 1: few samples are added one by one, without a copy."""
    torch.manual_seed(0)
    a, g = torch.randn(samples, 4, 7).to(dtype).mT, torch.randn(samples, 5, 7).to(dtype).mT
    weight, before = torch.rand(samples), torch.randn(5, 4)
    expected = torch.einsum("b,btp,btd->pd", weight.double(), g.double(), a.double())
    entry = Outer(a, g)
    torch.testing.assert_close(entry.weighted_sum(weight).double(), expected, rtol=1e-5, atol=1e-5)
    total = before.clone()
    assert entry.weighted_sum(weight, total) is total
    torch.testing.assert_close(total.double(), before.double() + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (8, 1), (10, 100)])
def test_the_norm_of_one_position_survives_factors_whose_squares_do_not(inputs, outputs):
    """The square of 1e-23 is zero in float32, and that of 1e20 infinite; the product of the two lengths is neither."""
    a, g = torch.full((2, 1, inputs), 1e20), torch.full((2, 1, outputs), 1e-23)
    exact = (g.double().mT @ a.double()).square().sum((1, 2))
    torch.testing.assert_close(Outer(a, g).norm_sq().double(), exact, rtol=1e-5, atol=0)
