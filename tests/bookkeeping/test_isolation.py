"""A sample that is not finite makes no other one so, also where a function runs on all samples at once."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.rules.generic import _isolated, _masked
from tests.models import parameters, trainer, updates


class Bag(pl.LightningModule):
    """Weighted sums of rows of a table: a function with indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(5, 4, mode="sum").double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        index, weight = batch
        return self.table(index, per_sample_weights=weight).square().sum(-1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Slots(Bag):
    """Attention to trained slots with dropout: a function that draws. So little that it drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, 3, 4).double())  # type: ignore[assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        query = batch[1][:, None, :, None].expand(-1, -1, -1, 4)
        out = F.scaled_dot_product_attention(query, self.table, self.table, dropout_p=1e-12)  # type: ignore[arg-type]
        return out.square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("make", [Bag, Slots])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_left_out_alone(make: Callable[[], Bag], value: float) -> None:
    g = torch.Generator().manual_seed(0)
    index, weight = torch.randint(0, 5, (8, 3), generator=g), torch.rand(8, 3, generator=g).double() + 0.5
    others = torch.arange(8) != 5

    def clipped(keep: Tensor, spoil: bool) -> Tensor:
        spoiled = weight.clone()
        spoiled[5] = value if spoil else weight[5]
        data = TensorDataset(index[keep], spoiled[keep])
        torch.manual_seed(0)
        module = make()
        before = parameters(module)
        strategy = ldp.DPStrategy(noise_multiplier=0, max_grad_norm=1.0)
        trainer(strategy, max_steps=1).fit(module, DataLoader(data, batch_size=len(data)))
        (update,) = updates(module, before).values()
        return update * len(data)

    everyone = torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(clipped(everyone, True), clipped(others, False))
    assert not torch.allclose(clipped(everyone, False), clipped(others, False)), "the sample counts where it is finite"


class Function:
    """What `Replay` is to the rule."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], parameter: Tensor) -> None:
        self.run, self.trained = run, [parameter]

    def __call__(self, trained: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.run(trained[0], others[0]),)


def isolated(run: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    function, axis = Function(run, torch.tensor([1.0, 2.0])), SampleAxis(0, 1)
    arguments = (x,), (torch.ones_like(x),), (axis,)
    rows, outputs = _masked(function, *arguments, len(x))  # type: ignore[arg-type]
    saved, gradients, axes = arguments
    found = _isolated("f", function, saved, [axis], gradients, axes, rows, outputs)  # type: ignore[arg-type]
    assert found[0] is not None
    return found[0]


def test_a_derivative_that_is_not_finite_is_an_error_where_it_would_spoil_the_others() -> None:
    x = torch.rand(4, 2) + 1
    x[2, 0] = 0  # where the root has no derivative
    with pytest.raises(
        ldp.UnsupportedModelError, match="'f' of a trained parameter has a derivative that is not finite"
    ):
        isolated(lambda p, x: (p * x).sqrt(), x)


def test_an_output_that_is_not_finite_is_kept_from_the_others() -> None:
    """Its argument is finite, its exponential is not."""
    x = torch.rand(4, 2)
    x[2, 0] = 100.0
    found = isolated(lambda p, x: (p * x).exp(), x)
    exact = x * (torch.tensor([1.0, 2.0]) * x).exp()
    others = torch.arange(4) != 2
    torch.testing.assert_close(found[others], exact[others])
    assert bool(found[2].isnan().all())


def test_where_nothing_is_finite_nothing_is_changed() -> None:
    assert bool(isolated(lambda p, x: p * x, torch.full((3, 2), torch.nan)).isnan().all())
