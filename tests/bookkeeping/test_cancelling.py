"""Samples whose gradients nearly cancel out, against float64: norms hold, and the others lose nothing by them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.costs import Way
from lightning_dp.bookkeeping.entries import Dense, Entry
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.bookkeeping.tables import Rows
from tests.models import parameters, trainer, updates


def clipped_sum(book: Book, bound: float = 1.0) -> Tensor:
    weight = (bound / book.norm_sq().sqrt()).clamp(max=1)
    sums: dict[str, Tensor] = {}
    book.pour(weight, sums)
    assert not book._alone, "nothing is held after it was poured out"
    return sums["w"]


@pytest.fixture(params=[Way.GHOST, Way.TILED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    monkeypatch.setattr("lightning_dp.bookkeeping.products.cheapest", lambda *_, **__: request.param)
    chosen: Way = request.param
    return chosen


def opposite(size: float, num_positions: int = 2) -> tuple[Tensor, Tensor]:
    """Return inputs and output gradients of one sample whose positions undo each other exactly."""
    a = torch.sign(torch.randn(1, 1, 64)).expand(1, num_positions, 64).contiguous()
    signs = torch.tensor([1.0, -1.0]).repeat(num_positions // 2)
    return a, size * signs[None, :, None] * torch.ones(1, 1, 16)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spare", [2**20, 0])
@pytest.mark.parametrize("uses", ["one", "two", "rows"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_what_cancels_takes_no_digits_from_the_others(uses: str, at: int, spare: int) -> None:
    """Whether there is memory to hold its gradient, or not."""
    torch.manual_seed(0)
    a, g = torch.randn(4, 20, 64), torch.randn(4, 20, 16)
    bad_a, bad_g = opposite(2.0**40, 20)

    def book(bad: bool) -> Book:
        rows = [(torch.cat([t[:at], other, t[at:]]) if bad else t) for t, other in ((a, bad_a), (g, bad_g))]
        book = Book(len(rows[0]), spare=spare)
        if uses == "one":
            book.entries["w"] = [Outer(*rows)]
        elif uses == "two":
            book.entries["w"] = [Outer(rows[0][:, k::2].contiguous(), rows[1][:, k::2].contiguous()) for k in (0, 1)]
        else:
            book.entries["w"] = [Rows(torch.zeros(rows[1].shape[:2], dtype=torch.long), rows[1], 100)]
        return book

    without = clipped_sum(book(False))
    assert float((clipped_sum(book(True)) - without).norm()) < 1e-4 * float(without.norm())


def near(share: float, num_positions: int, num_inputs: int = 32) -> tuple[Tensor, Tensor]:
    """Return inputs and output gradients that cancel up to this share of the squared norm."""
    direction = torch.randn(4, 1, num_inputs)
    signs = torch.ones(num_positions)
    signs[num_positions // 2 :] = -1
    most, rest = torch.randn(4, 1, num_inputs), torch.randn(4, 1, num_inputs)
    rest = rest / rest.norm(dim=-1, keepdim=True) * most.norm(dim=-1, keepdim=True) * share**0.5
    order = signs[torch.randperm(num_positions)]
    return direction.expand(4, num_positions, num_inputs).contiguous(), order[None, :, None] * most + rest


def check(entries: list[Entry], exact: Tensor, tolerance: float) -> None:
    book = Book(len(exact), {"w": entries})
    lengths = exact.flatten(1).norm(dim=1)
    booked = book.norm_sq().double().sqrt()
    assert float((lengths / booked - 1).abs().max()) < tolerance
    for i in range(len(exact)):  # what is added, clipped to 1, is as long as 1 and no more
        weight = torch.zeros(len(exact))
        weight[i] = 1 / booked[i]
        assert float(book.weighted_sums(weight)["w"].double().norm()) < 1 + tolerance


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_positions", [64, 1024, 4096])
@pytest.mark.parametrize("share", [1e-8, 1e-6, 1e-5, 5e-5, 2e-4, 1e-3])
def test_norms_hold_whatever_share_is_left(num_positions: int, share: float) -> None:
    torch.manual_seed(0)
    a, g = near(share, num_positions)
    check([Outer(a, g)], torch.einsum("btp,btd->bpd", g.double(), a.double()), 3e-3)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kinds", ["products", "rows", "rows and product", "dense and product"])
@pytest.mark.parametrize("share", [1e-8, 1e-6, 1e-4])
def test_norms_hold_where_each_of_two_uses_cancels(kinds: str, share: float) -> None:
    torch.manual_seed(0)
    (a, g), (_, h) = near(share, 64), near(share, 64)
    index = torch.zeros(4, 64, dtype=torch.long)
    product = torch.einsum("btp,btd->bpd", g.double(), a.double())
    in_row = torch.zeros(4, 32, 32).double()
    in_row[:, 0] = h.double().sum(1)
    entries: dict[str, tuple[list[Entry], Tensor]] = {
        "products": ([Outer(a, g), Outer(a, h)], product + torch.einsum("btp,btd->bpd", h.double(), a.double())),
        "rows": ([Rows(index, h, 32), Rows(index, h, 32)], 2 * in_row),
        "rows and product": ([Outer(a, g), Rows(index, h, 32)], product + in_row),
        "dense and product": ([Outer(a, g), Dense(in_row.float())], product + in_row),
    }
    check(*entries[kinds], 3e-3)


def flagged(*entries: Entry) -> list[int]:
    book = Book(entries[0].num_samples, {"w": list(entries)})
    book.norm_sq()
    return list(book._alone.get("w", {}))


def test_what_does_not_cancel_is_left_in_the_sum() -> None:
    """Random directions, differences of inputs that are alike, rows of a table, and gradients of next to nothing."""
    torch.manual_seed(0)
    a, g = torch.randn(8, 20_000, 8), torch.randn(8, 20_000, 8)
    assert flagged(Outer(a, g)) == []
    own = torch.rand(8, 100, 2)
    torch.testing.assert_close(
        Rows(torch.arange(100).expand(8, -1), own, 200).uncancelled(), own.flatten(1).norm(dim=1)
    )
    torch.testing.assert_close(Rows(torch.zeros(8, 100).long(), own, 200).uncancelled(), own.norm(dim=2).sum(1))
    one, back = torch.randn(8, 1, 64), torch.randn(8, 1, 32)
    pair = torch.cat([one, one + 0.1 * torch.randn(8, 1, 64)], 1), torch.cat([back, -back], 1)
    assert flagged(Outer(*pair)) == []
    assert flagged(Outer(a[:, :50], 1e-25 * g[:, :50])) == []
    assert flagged(Outer(a[:, :50], 0 * g[:, :50])) == []


def test_samples_without_positions_have_a_gradient_of_zero() -> None:
    nothing = torch.zeros(2, 0, 3)
    for entry in (Outer(nothing, nothing), Rows(torch.zeros(2, 0).long(), nothing, 3)):
        book = Book(2, {"w": [entry]})
        assert book.norm_sq().tolist() == [0, 0]
        assert not bool(book.weighted_sums(torch.ones(2))["w"].any())


@pytest.mark.parametrize(("inputs", "gradients"), [(2e-23, 5e17), (2e-24, 5e17), (1e20, 1e-12), (3e18, 1e-18)])
def test_norms_hold_where_squares_leave_the_range_of_numbers(inputs: float, gradients: float) -> None:
    a, g = torch.full((2, 64, 1024), inputs), torch.full((2, 64, 8), gradients)
    g[1] = 0
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double())[:1]
    book = Book(2, {"w": [Outer(a, g)]})
    booked = book.norm_sq().double()[0].sqrt()
    assert float(booked) == pytest.approx(float(exact.norm()), rel=1e-4)
    assert list(book._alone.get("w", {})) in ([0], []), "a gradient of zero is not materialised"


def test_a_book_that_is_divided_takes_what_cancels_with_it() -> None:
    torch.manual_seed(0)
    a, g = opposite(2.0**30)
    book = Book(2)
    for name in ("w", "v"):
        book.entries[name] = [Outer(torch.cat([a, torch.randn(1, 2, 64)]), torch.cat([g, torch.randn(1, 2, 16)]))]
    book.norm_sq()
    assert {name: list(found) for name, found in book._alone.items()} == {"w": [0], "v": [0]}
    assert list(book.take(["w"])._alone) == ["w"]
    assert list(book._alone) == ["v"]


class Siamese(pl.LightningModule):
    """Differences of what a layer makes of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 64, bias=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other, y = batch
        return ((self.net(one) - self.net(other)).sum(-1) * y).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_pair_of_equal_inputs_moves_a_fit_by_no_more_than_the_bound() -> None:
    g = torch.Generator().manual_seed(0)
    one, other, y = 1 + 0.1 * torch.randn(32, 64, generator=g), torch.zeros(32, 64), torch.ones(32)
    alike = torch.sign(torch.randn(1, 64, generator=g))

    def clipped(size: float | None) -> Tensor:
        data = (one, other, y)
        if size is not None:
            data = torch.cat([one, alike]), torch.cat([other, alike]), torch.cat([y, torch.tensor([size])])
        torch.manual_seed(0)
        module = Siamese()
        before = parameters(module)
        strategy = ldp.DPStrategy(noise_multiplier=1e-9, max_grad_norm=1.0)
        trainer(strategy, max_steps=1).fit(module, DataLoader(TensorDataset(*data), batch_size=len(data[0])))
        return updates(module, before)["net.weight"] * len(data[0])

    without = clipped(None)
    assert float(without.norm()) > 30  # of 32 alike
    for size in (2.0**20, 2.0**28):
        assert float((clipped(size) - without).norm()) < 0.01
