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


def isolated(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, upstream: Tensor | None = None) -> Tensor:
    function, axis = Function(run, torch.tensor([1.0, 2.0])), SampleAxis(0, 1)
    gradients, axes = (torch.ones_like(x) if upstream is None else upstream,), (axis,)
    rows = _masked(function, (x,), gradients, axes, len(x))  # type: ignore[arg-type]
    (found,) = _isolated(rows, function, (x,), [axis], gradients, axes)  # type: ignore[arg-type]
    assert found is not None
    return found


P, OTHERS = torch.tensor([1.0, 2.0]), torch.arange(4) != 2


def test_a_derivative_that_is_not_finite_is_kept_from_the_others() -> None:
    x = torch.rand(4, 2) + 1
    x[2, 0] = 0  # where the root has no derivative
    found = isolated(lambda p, x: (p * x).sqrt(), x)
    torch.testing.assert_close(found[OTHERS], (x / (2 * (P * x).sqrt()))[OTHERS])
    assert not bool(found[2].isfinite().all())


def test_an_output_that_is_not_finite_is_kept_from_the_others() -> None:
    """Its argument is finite, its exponential is not."""
    x = torch.rand(4, 2)
    x[2, 0] = 100.0
    found = isolated(lambda p, x: (p * x).exp(), x)
    torch.testing.assert_close(found[OTHERS], (x * (P * x).exp())[OTHERS])
    assert not bool(found[2].isfinite().all())


def test_an_infinite_argument_that_means_nothing_is_none() -> None:
    """As a mask of minus infinity, which all samples have."""
    x = torch.rand(4, 2)
    x[:, 1] = -torch.inf
    x[2, 0] = torch.nan
    found = isolated(lambda p, x: (x + p[0]).softmax(1) * p[0], x)
    torch.testing.assert_close(found[OTHERS], torch.tensor([[1.0, 0.0]]).expand(3, 2))
    assert not bool(found[2].isfinite().all())


def test_gradients_that_come_back_not_finite_are_their_samples_own() -> None:
    x, upstream = torch.rand(4, 2), torch.ones(4, 2)
    upstream[2] = torch.nan
    upstream[0] = torch.inf
    found = isolated(lambda p, x: p * x, x, upstream)
    torch.testing.assert_close(found[[1, 3]], x[[1, 3]])
    assert not bool(found[[0, 2]].isfinite().any())


class Token(Bag):
    """A trained row for every sample, by a function that takes nothing else."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (row, *_) = self.table.weight
        return (torch.stack([row] * len(batch[1])).sum(1, keepdim=True) * batch[1]).square().sum(1).mean()


def test_a_function_without_other_arguments() -> None:
    weight = torch.rand(8, 3).double()
    weight[5] = torch.nan
    module = Token()
    before = parameters(module)
    data = DataLoader(TensorDataset(torch.zeros(8), weight), batch_size=8)
    trainer(ldp.DPStrategy(noise_multiplier=0, max_grad_norm=1.0), max_steps=1).fit(module, data)
    (update,) = updates(module, before).values()
    assert bool(update.isfinite().all())
    assert float(update.abs().max()) > 0.1  # of seven samples, most of them clipped to 1


def test_gradients_that_share_their_memory() -> None:
    x = torch.rand(4, 2)
    x[2, 0] = torch.nan
    found = isolated(lambda p, x: p.sum() * x.sum(1, keepdim=True), x, torch.ones(4, 1))
    torch.testing.assert_close(found[OTHERS], x.sum(1, keepdim=True).expand(4, 2)[OTHERS])
