"""Small parameters side by side: norms and sums against a loop over the samples, one by one in float64."""

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import BookKeeping
from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.bundles import bundles_of
from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.products import Outer

B = 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def booked(model: nn.Module, x: Tensor) -> Book:
    keeping = BookKeeping(dict(model.named_parameters()))
    keeping.observe(lambda units: loss_of(model, torch.stack([x["ab".index(unit)] for unit in units])))
    with keeping.recording(len(x)):
        loss_of(model, x).backward()
    return keeping.close()


def by_hand(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """Return the gradient of every sample."""
    exact = network().double()
    exact.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    names = [name for name, _ in exact.named_parameters()]
    return [
        dict(zip(names, torch.autograd.grad(loss_of(exact, one[None].double()), list(exact.parameters())), strict=True))
        for one in x
    ]


def test_norms_and_sums_are_those_of_a_loop() -> None:
    model, x = network(), torch.randn(B, 4, generator=torch.Generator().manual_seed(1))
    book, gradients = booked(model, x), by_hand(model, x)
    (bundle,) = bundles_of(book.entries)
    assert {name for name in bundle.members if "bias" in name} == {f"{k}.bias" for k in (0, 1, 3, 4, 5)}
    norm_sq = torch.stack([torch.stack([g.square().sum() for g in one.values()]).sum() for one in gradients])
    torch.testing.assert_close(book.norm_sq().double(), norm_sq, rtol=1e-5, atol=0)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25])
    sums: dict[str, Tensor] = {}
    for _ in range(2):  # the second time it is added to what is there
        again = booked(model, x)
        again.norm_sq()
        again.pour(weight, sums)
        assert not again.entries
    for name, p in model.named_parameters():
        expected = 2 * sum(w * one[name] for w, one in zip(weight.tolist(), gradients, strict=True))
        torch.testing.assert_close(sums[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert sums[name].shape == p.shape
        assert sums[name].is_contiguous()


def book_of(*entries: tuple[str, Tensor]) -> Book:
    book = Book(len(entries[0][1]))
    for name, g in entries:
        book.file(name, Dense(g))
    return book


def test_each_type_has_a_bundle_of_its_own_and_what_is_large_or_alone_has_none() -> None:
    small = {
        f"{dtype} {k}": torch.ones(2, 3, k + 1, dtype=dtype) for dtype in (torch.float32, torch.float64) for k in (0, 1)
    }
    complex_ones = {name: torch.ones(2, 1, dtype=torch.complex64) for name in ("one", "other")}
    book = book_of(*small.items(), *complex_ones.items(), ("large", torch.ones(2, 2**15 + 1)))
    book.file("product", Outer(torch.ones(2, 4, 3), torch.ones(2, 4, 3)))
    book.file("twice", Dense(torch.ones(2, 1)))
    book.entries["twice"].append(Dense(torch.ones(2, 1)))
    found = [list(bundle.members) for bundle in bundles_of(book.entries)]
    assert found == [[name for name in small if str(dtype) in name] for dtype in (torch.float32, torch.float64)]
    assert not list(bundles_of(book_of(("alone", torch.ones(2, 1)), ("other", torch.ones(2, 1).double())).entries))


def test_a_sample_that_is_not_a_number_adds_exact_zeros() -> None:
    g = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    book, sums = book_of(("a", g), ("b", 3 * g)), {}
    norm_sq = book.norm_sq()
    assert norm_sq[0] == pytest.approx(5 + 45)
    assert norm_sq[1].isnan()
    book.pour(torch.tensor([2.0, 0.0]), sums)
    assert sums["a"].tolist() == [2.0, 4.0]
    assert sums["b"].tolist() == [6.0, 12.0]


def test_what_is_filed_or_taken_after_the_norms_counts() -> None:
    ones, sums = torch.ones(2, 3), {}
    book = book_of(("a", ones), ("b", ones), ("c", ones))
    assert book.norm_sq().tolist() == pytest.approx([9, 9])
    taken = book.take(["a"])
    book.file("d", Dense(2 * ones))
    assert book.norm_sq().tolist() == pytest.approx([3 + 3 + 12] * 2)
    book.pour(torch.tensor([1.0, 10.0]), sums)
    taken.pour(torch.tensor([1.0, 10.0]), sums)
    assert {name: total.tolist() for name, total in sums.items()} == {
        "a": [11.0] * 3, "b": [11.0] * 3, "c": [11.0] * 3, "d": [22.0] * 3,
    }  # fmt: skip


def test_a_book_that_was_poured_out_holds_nothing() -> None:
    """Of hundreds of entries, the largest would otherwise be held until the next pass."""
    book = booked(network(), torch.randn(B, 4))
    book.norm_sq()
    held = [weakref.ref(t) for entries in book.entries.values() for entry in entries for t in entry.held]
    assert all(reference() is not None for reference in held)
    book.pour(torch.ones(B), {})
    assert not any(reference() is not None for reference in held)


def test_sums_of_another_type_are_added_to() -> None:
    sums = {"a": torch.ones(3, dtype=torch.float64)}
    book_of(("a", torch.ones(2, 3)), ("b", torch.ones(2, 3))).pour(torch.ones(2), sums)
    assert (sums["a"].dtype, sums["a"].tolist(), sums["b"].tolist()) == (torch.float64, [3.0] * 3, [2.0] * 3)
