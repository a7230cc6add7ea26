"""The choice of the way to a norm, against costs counted by hand; and that every way finds the same."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp.bookkeeping import BookKeeping, costs
from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.costs import Rates, Shape, Way, cheapest, fastest, rates_of
from lightning_dp.bookkeeping.entries import Dense, Kept, norms_sq
from lightning_dp.bookkeeping.products import Outer

CPU = Rates(products=40e9, elements=1e9)
FAST_MEMORY = Rates(products=40e9, elements=1e12)
SLOW_CALLS = Rates(products=40e9, elements=1e9, call=1e-3)
NEW_MEMORY = Rates(products=40e9, elements=9e9, touch=2e-9)
OLD_MEMORY = Rates(products=40e9, elements=9e9)


@pytest.mark.parametrize(
    ("shape", "rates", "spare", "expected"),
    [
        # A layer of a transformer: Gram matrices 4 % of the product, writing 768^2 gradients far more.
        (Shape(16, 32, 768, 768), CPU, 10**9, Way.GHOST),
        # 1024 positions: Gram matrices cost 2.7 times the product; a gradient is less than what came back.
        (Shape(1, 1024, 768, 768), CPU, 0, Way.KEPT),
        # Nothing but bandwidth decides: at 128 positions.
        (Shape(4, 128, 768, 768), CPU, 10**9, Way.GHOST),
        (Shape(4, 128, 768, 768), FAST_MEMORY, 10**9, Way.KEPT),
        # The same without the memory: the Gram matrices are a quarter of the product.
        (Shape(4, 128, 768, 768), FAST_MEMORY, 0, Way.GHOST),
        # A head with a large vocabulary.
        (Shape(4, 128, 768, 50257), CPU, 0, Way.GHOST),
        (Shape(1, 1024, 768, 50257), CPU, 0, Way.KEPT),
        # Long and wide, many samples, no memory: Gram matrices would cost 5 times the product.
        (Shape(64, 1000, 400, 400), CPU, -(10**9), Way.TILED),
        # So little that the number of calls decides.
        (Shape(8, 2, 100, 100), CPU, 10**9, Way.GHOST),
        (Shape(8, 2, 100, 100), SLOW_CALLS, 10**9, Way.KEPT),
        # 197 positions, as of an image: Gram matrices are a fifth of the product, new memory would cost more than that.
        (Shape(4, 197, 768, 3072), NEW_MEMORY, 10**9, Way.GHOST),
        (Shape(4, 197, 768, 3072), OLD_MEMORY, 10**9, Way.KEPT),
        # 128 positions, too few for bands: Gram matrices are a fifth of the product.
        (Shape(4, 128, 768, 3072), OLD_MEMORY, 10**9, Way.KEPT),
        # 96 positions: nearly alike, and not worth the memory.
        (Shape(4, 96, 768, 3072), OLD_MEMORY, 10**9, Way.GHOST),
    ],
)
def test_the_cheapest_way(shape: Shape, rates: Rates, spare: int, expected: Way) -> None:
    assert cheapest(shape, rates, spare) is expected


@pytest.mark.parametrize("positions", [1, 10, 100, 1000])
@pytest.mark.parametrize("size", [8, 100, 1000])
@pytest.mark.parametrize("rates", [CPU, FAST_MEMORY])
def test_the_choice_is_the_least_of_costs_written_down_a_second_time(positions: int, size: int, rates: Rates) -> None:
    b, t, d, p = 4, positions, size, 2 * size
    moved, multiplied = 1 / rates.elements, 1 / rates.products
    scaled = 2 * b * t * d * moved
    expected = {
        Way.GHOST: (b * t * t * (d + p) * multiplied + 6 * b * t * t * moved) * (1 if t < 192 else 9 / 16) + scaled,
        Way.KEPT: 3 * b * d * p * moved,
        Way.TILED: b * t * d * p * multiplied + 2 * b * d * p * moved + scaled,
    }
    chosen = cheapest(Shape(b, t, d, p), rates, 10**12)
    if d * p > t * (d + p):  # keeping takes memory: it has to be faster by a tenth of the product
        expected[Way.KEPT] += 0.1 * b * t * d * p * multiplied
    assert expected[chosen] == pytest.approx(min(expected.values()))
    del expected[Way.KEPT]
    chosen = cheapest(Shape(b, t, d, p), rates, 10**12, kept=False)
    assert expected[chosen] == pytest.approx(min(expected.values()))


def test_rates_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    rates = rates_of(like)
    assert 1e6 < rates.products < 1e16
    assert 1e6 < rates.elements < 1e16
    monkeypatch.setattr(costs, "_shortest", lambda *_, **__: pytest.fail("measured again"))
    assert rates_of(torch.ones(7, dtype=torch.float64)) == rates


def test_a_device_is_measured_before_anything_else_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    monkeypatch.setattr(costs, "_measured", lambda device, dtype, threads: order.append((device.type, dtype)))
    model = nn.Linear(2, 1).bfloat16()

    def forward(samples: str) -> torch.Tensor:
        order.append(samples)
        return model(torch.stack([torch.full((2,), float(ord(name))) for name in samples]).bfloat16()).sum()

    BookKeeping(dict(model.named_parameters())).observe(forward)
    assert order[0] == ("cpu", torch.float32)  # in which norms are found, whatever the model computes in
    assert order.count(order[0]) == 1


def test_the_fastest_way_is_tried_once_for_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, tried = {"a": 2.0, "b": 1.0, "c": 3.0}, []

    def clock(work: object, device: torch.device, repeats: int) -> float:
        tried.append(work())  # type: ignore[operator]
        return seconds[tried[-1]]

    monkeypatch.setattr(costs, "_shortest", clock)
    monkeypatch.setattr(costs, "_FASTEST", {})
    ways = {name: (lambda name=name: name) for name in seconds}
    cpu = torch.device("cpu")
    assert [fastest("one", ways, cpu), fastest("one", ways, cpu)] == ["b", "b"]
    assert tried == ["a", "b", "c"]
    seconds["c"] = 0.5
    assert fastest("two", ways, cpu) == "c"
    assert fastest("three", {"a": ways["a"]}, cpu) == "a", "there is nothing to try"
    assert len(tried) == 6


KEEP = Rates(1e3, 1e12)


@pytest.mark.parametrize(
    "positions", [60, *(count * costs.LEAST_BAND + more for count, more in ((1, 0), (2, 0), (2, 1), (5, 7), (9, 1)))]
)
@pytest.mark.parametrize("way", Way)
def test_every_way_finds_the_same(way: Way, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.bookkeeping.products.cheapest", lambda *_, **__: way)
    torch.manual_seed(0)
    a, g = torch.randn(3, positions, 10).double(), torch.randn(3, positions, 12).double()
    product = torch.einsum("btp,btd->bpd", g, a)
    book = Book(3)
    book.file("w", Outer(a, g))
    [entry] = book.entries["w"]
    assert entry.method == way.value
    assert isinstance(entry, Kept) == (way is Way.KEPT)
    torch.testing.assert_close(book.norm_sq(), product.flatten(1).square().sum(1))
    torch.testing.assert_close(book.weighted_sums(torch.arange(3.0))["w"], product[1] + 2 * product[2])


@pytest.mark.parametrize("order", ["in halves", "side by side"])
@pytest.mark.parametrize("positions", [60, 2 * costs.LEAST_BAND, 7 * costs.LEAST_BAND])
def test_a_norm_that_cancels_in_a_gram_matrix_is_found_again(
    order: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the positions undo the other half, but for a thousandth, which a Gram sum in float32 loses."""
    monkeypatch.setattr("lightning_dp.bookkeeping.products.cheapest", lambda *_, **__: Way.GHOST)
    torch.manual_seed(0)
    a, g = torch.randn(2, positions // 2, 50), torch.randn(2, positions // 2, 60)
    a, g = torch.cat([a, a], 1), torch.cat([g, -1.001 * g], 1)
    if order == "side by side":
        a, g = (t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for t in (a, g))
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double()).flatten(1).square().sum(1)
    torch.testing.assert_close(Book(2, {"w": [Outer(a, g)]}).norm_sq().double(), exact, rtol=1e-2, atol=0)


def test_what_is_kept_beyond_the_spare_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.bookkeeping.products.rates_of", lambda _: KEEP)
    book = Book(2, spare=2 * 2 * 450)  # each: 2 x 25 x 25 gradients in place of 2 x 10 x (25 + 25)... 250 more
    for name in "abcdefghij":
        book.file(name, Outer(torch.randn(2, 9, 25), torch.randn(2, 9, 25)))
    kept = [name for name, [entry] in book.entries.items() if isinstance(entry, Kept)]
    assert kept == ["a", "b", "c", "d", "e"]  # 2 * (25 * 25 - 9 * 50) = 350 each, of 1800
    assert book.spare == 1800 - 5 * 350


def test_uses_of_one_parameter_are_added_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.bookkeeping.products.rates_of", lambda _: KEEP)
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 20, 3).double(), torch.randn(2, 20, 4).double()) for _ in range(5)]
    other = torch.randn(2, 4, 3).double()
    before = other.clone()
    book = Book(2, spare=0)  # the first takes less than what it was made of, and the others nothing
    for a, g in pairs:
        book.file("w", Outer(a, g))
    book.file("w", Dense(other))
    assert len(book.entries["w"]) == 1
    assert book.spare == 0
    total = other + sum(torch.einsum("btp,btd->bpd", g, a) for a, g in pairs)
    torch.testing.assert_close(book.norm_sq(), total.flatten(1).square().sum(1))
    assert torch.equal(other, before), "what the book does not own is not written"


def test_pouring_adds_in_place_and_empties_the_book() -> None:
    torch.manual_seed(0)
    sums: dict[str, torch.Tensor] = {}
    expected, first = torch.zeros(4, 3).double(), None
    for _ in range(3):
        a, g, weight = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 4).double(), torch.rand(2).double()
        book = Book(2)
        book.file("w", Outer(a, g))
        book.pour(weight, sums)
        first = sums["w"] if first is None else first
        expected += torch.einsum("b,btp,btd->pd", weight, g, a)
        assert book.entries == {}
    assert sums["w"] is first
    torch.testing.assert_close(sums["w"], expected)


@pytest.mark.parametrize("shape", [(4000, 5000), (100, 200_000), (2000, 1000, 3, 3), (50, 20, 200, 100), (10**5,), ()])
def test_norms_of_large_parameters_keep_their_digits(shape: tuple[int, ...]) -> None:
    """One sum over all of these in float32 is 4 % too small."""
    large = torch.full((1, *shape), 1.1)
    assert float(norms_sq(large)) == pytest.approx(math.prod(shape) * 1.1**2, rel=3e-5)


CONVOLUTIONS = {
    "2d": (nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=1), (3, 7, 6)),
    "2d, grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5)),
    "2d, kernel 1": (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    "2d, kernel 1, strided": (nn.Conv2d(4, 6, 1, stride=(2, 3)), (4, 5, 7)),
    "2d, kernel 1, padded": (nn.Conv2d(4, 6, 1, padding=1), (4, 3, 3)),
    "1d, kernel 1": (nn.Conv1d(4, 6, 1, stride=2), (4, 7)),
    "3d": (nn.Conv3d(2, 4, 2), (2, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (3, 4, 4)),
}


@pytest.mark.parametrize("way", ["grouped", "one by one", "unfolded"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_every_way(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(key: object, ways: dict[str, object], device: torch.device) -> str:
        hash(key)
        chosen.append(way if way in ways else "grouped")
        return chosen[-1]

    module = sys.modules["lightning_dp.bookkeeping.rules.convolution"]  # the package has a function of that name
    monkeypatch.setattr(module, "fastest", choose)
    monkeypatch.setattr(module, "_UNFOLDED_IS_TRIED", 1e9)
    layer, shape = CONVOLUTIONS[name]
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randn(4, *shape).double()
    keeping = BookKeeping(dict(layer.named_parameters()))
    keeping.observe(lambda samples: layer(x[["ab".index(s) for s in samples]]).square().sum())
    with keeping.recording(4):
        loss = layer(x).square().sum()
    with keeping.recording():
        loss.backward()
    book = keeping.close()
    alone = [torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(layer.parameters())) for i in range(4)]
    norms = torch.stack([torch.stack([g.square().sum() for g in one]).sum() for one in alone])
    torch.testing.assert_close(book.norm_sq(), norms)
    weight = torch.rand(4).double()
    sums = book.weighted_sums(weight)
    torch.testing.assert_close(sums["weight"], sum(w * one[0] for w, one in zip(weight, alone, strict=True)))
    assert (chosen == []) == (name.endswith(("kernel 1", "strided"))), "a product of matrices is no matter of trying"
    if name == "2d":
        assert set(chosen) == {way}


def test_a_convolution_of_parameters_alone_is_carried_back() -> None:
    """Its entry is not settled, and masked and summed as it is."""
    layer = nn.Conv2d(2, 3, 2).double()
    scale = nn.Parameter(torch.rand(3, 1, 1, 1).double() + 0.5)
    x = torch.randn(3, 2, 4, 4).double()
    trained = {**dict(layer.named_parameters()), "scale": scale}

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, layer.weight * scale, layer.bias).square().sum()

    keeping = BookKeeping(trained)
    keeping.observe(lambda samples: loss_of(x[["ab".index(s) for s in samples]]))
    with keeping.recording(3):
        loss = loss_of(x)
    with keeping.recording():
        loss.backward()
    found = keeping.close().weighted_sums(torch.tensor([1.0, 0.0, 1.0]).double())
    expected = torch.autograd.grad(loss_of(x[[0, 2]]), list(trained.values()))
    for name, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)
