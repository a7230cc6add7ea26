"""What has no exact per-sample gradient is refused, by name and with the way out; nothing is silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.bookkeeping import BookKeeping
from lightning_dp.errors import UnsupportedModelError
from tests.bookkeeping.cases import Raw, ids, mean_loss, rand, reals
from tests.bookkeeping.oracle import Batch, Case, check, select


def refused(build: Callable[[], nn.Module], batch: Callable[[], Batch], match: str, loss: Any = mean_loss) -> None:
    """Assert that a model is refused by observation, recording or the end of the pass."""
    with pytest.raises(UnsupportedModelError, match=match):
        check(Case("refused", build, batch, loss))


def refused_raw(function: Callable[..., Tensor], shape: tuple[int, ...], match: str, **members: Any) -> None:
    """Assert that a function of raw parameters is refused."""
    refused(lambda: Raw(function, **members), reals(*shape), match)


class Double(torch.autograd.Function):
    """A function that torch does not let us see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def keeping_of(model: nn.Module, batch: Batch, loss: Any = mean_loss) -> BookKeeping:
    """Return an observed book-keeping."""
    keeping = BookKeeping(dict(model.named_parameters()))
    keeping.observe(lambda samples: loss(model, select(batch, ["ab".index(s) for s in samples])))
    return keeping


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_options(kind: type[nn.Module], option: dict[str, Any]) -> None:
    refused(lambda: kind(7, 5, **option), ids(6), "Use max_norm=None, scale_grad_by_freq=False")


def test_custom_function_of_a_parameter() -> None:
    refused_raw(lambda m, x: x * Double.apply(m.w), (5,), r"'w' enters Double \(.*test_refusals.py", w=rand(5))


def test_custom_function_of_a_derived_tensor() -> None:
    refused_raw(lambda m, x: x * Double.apply(m.w.exp()), (5,), "'w' received a gradient", w=rand(5))


def test_scripted_function() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch warn of tracing
        scripted = torch.jit.trace(lambda x, w: x * w, (torch.ones(3), torch.ones(3)))
    refused_raw(
        lambda m, x: scripted(x, m.w), (5,), r"'w' enters an operation \(Mul, .*test_refusals.py:\d+\)", w=rand(5)
    )


def test_vmap_over_samples() -> None:
    refused_raw(
        lambda m, x: torch.vmap(lambda xi: F.linear(xi, m.w))(x),
        (5,),
        r"'w' enters an operation \(.*test_refusals.py:\d+\) that torch does not let us see.*torch.vmap",
        w=rand(3, 5),
    )


def test_vmap_over_parameters() -> None:
    def ensemble(m: Any, x: Tensor) -> Tensor:
        return torch.vmap(lambda w: F.linear(x, w))(torch.stack([m.w, m.v])).transpose(0, 1)

    refused_raw(ensemble, (5,), "received a gradient", w=rand(3, 5), v=rand(3, 5))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_train_mode(affine: bool) -> None:
    refused(
        lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=affine), nn.Linear(5, 2)),
        reals(5),
        "a sample changes what the function computes for another sample",
    )


def test_centering_over_the_batch() -> None:
    refused_raw(lambda m, x: (x - x.mean(0)) * m.w, (5,), "changes what the function computes", w=rand(5))


def test_mixing_of_samples() -> None:
    refused_raw(lambda m, x: (x + 0.1 * x.roll(1, 0)) * m.w, (5,), "changes what the function computes", w=rand(5))


@pytest.mark.parametrize("number", [lambda x: x.mean(), lambda x: x.mean().item()])
def test_number_that_depends_on_the_batch(number: Callable[[Tensor], Any]) -> None:
    refused_raw(lambda m, x: x * (m.w * number(x.detach())), (5,), "changes what the function computes", w=rand(5))


def test_slice_that_depends_on_the_batch() -> None:
    def cut(m: Any, x: Tensor) -> Tensor:
        return x * m.w[: 1 if x[0, 0] > x[-1, 0] else 2].sum()

    torch.manual_seed(0)
    refused_raw(cut, (5,), "changes what the function computes|ran other functions", w=rand(5))


def test_contrastive_logits() -> None:
    refused_raw(lambda m, x: (x @ x.T) * m.t.exp(), (5,), "do not scale with the number of samples", t=rand())


def test_parameter_times_the_mean_loss() -> None:
    def weighted(m: nn.Module, b: Batch) -> Tensor:
        return mean_loss(m.f, b) * m.s.exp() + m.s

    refused(
        lambda: Raw(lambda m, x: x, f=nn.Linear(5, 3), s=rand()), reals(5), "already reduced over the batch", weighted
    )


def test_parameter_times_the_mean_loss_without_its_gradient() -> None:
    def logged(m: nn.Module, b: Batch) -> Tensor:
        loss = mean_loss(m.f, b)
        m.s * loss  # only looked at
        return loss

    check(Case("logged", lambda: Raw(lambda m, x: x, f=nn.Linear(5, 3), s=rand()), reals(5), logged))


def test_reduced_sum_used_for_single_samples() -> None:
    refused_raw(
        lambda m, x: x * (m.f(x).mean() + m.s),
        (5,),
        "something already reduced over the batch",
        f=nn.Linear(5, 3),
        s=rand(),
    )


def test_routing_by_content() -> None:
    def routed(m: Any, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], 4, dtype=x.dtype)
        mask = flat[:, 0] > 0
        out[mask] = flat[mask] @ m.w
        return out.unflatten(0, x.shape[:2])

    refused_raw(routed, (6, 5), "do not scale with the number of samples", w=rand(5, 4))


def test_routing_by_content_with_equal_counts_when_observed() -> None:
    """The first two samples choose two rows each: that is luck, and the next batch has other numbers."""

    def routed(m: Any, x: Tensor) -> Tensor:
        return (x[x[..., 0] > 0] @ m.w).sum(0, keepdim=True) + x.mean((1, 2))[:, None]

    def batch() -> Batch:
        x = torch.rand(4, 3, 5) + 0.1
        for i, count in enumerate((2, 2, 1, 3)):
            x[i, count:, 0] *= -1
        return {"x": x}

    refused(lambda: Raw(routed, w=rand(5, 4)), batch, "chosen by their content")


def test_order_of_rows_that_cannot_be_told() -> None:
    def typed(m: Any, x: Tensor) -> Tensor:
        kinds = torch.zeros(x.shape[1], x.shape[0], dtype=torch.long)  # time-major, the same everywhere
        return x + m.e(kinds.flatten()).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    def straight(m: nn.Module, b: Batch) -> Tensor:
        return m(b["x"]).flatten(1).mean(1).mean()  # so that all gradients are the same, too

    build = lambda: Raw(typed, e=nn.Embedding(2, 5))  # noqa: E731
    refused(build, reals(3, 5), "which rows belong to which sample cannot be told", straight)


def test_rows_of_a_sample_apart_in_another_number() -> None:
    """Rows (position, sample, frame): with more rows, it cannot be told whether there are more positions or frames."""
    torch.manual_seed(0)

    def frames(m: Any, x: Tensor) -> Tensor:
        batch, count, length, _ = x.shape
        return m.f(x.permute(2, 0, 1, 3).flatten(0, 2)).unflatten(0, (length, batch, count)).permute(1, 2, 0, 3)

    model, batch = Raw(frames, f=nn.Linear(5, 3)), reals(2, 3, 5)()
    keeping = keeping_of(model, batch)
    with (
        pytest.raises(UnsupportedModelError, match="held 6 rows of each sample .* 2 of them together, and now holds"),
        keeping.recording(4),
    ):
        mean_loss(model, reals(4, 3, 5)()).backward()


def test_function_that_was_not_observed() -> None:
    torch.manual_seed(0)
    model, batch = Raw(lambda m, x: m.f(x) if len(x) < 4 else m.f(x) * m.w, f=nn.Linear(5, 3), w=rand(3)), reals(5)()
    keeping = keeping_of(model, batch)
    with (
        pytest.raises(UnsupportedModelError, match="'w' was not used when the model was observed"),
        keeping.recording(4),
    ):
        mean_loss(model, batch)


def test_lazy_parameter() -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(UnsupportedModelError, match="'weight' is not initialised yet"):
        BookKeeping(dict(model.named_parameters())).observe(lambda samples: None)


def test_parameter_with_its_own_torch_function() -> None:
    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.raises(UnsupportedModelError, match="'w' is a Own with a __torch_function__ of its own"):
        BookKeeping({"w": Own(torch.ones(3))}).observe(lambda samples: None)


def test_gradient_hook_of_a_parameter() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.register_hook(lambda g: g * 0)
    with pytest.raises(UnsupportedModelError, match="'w' has a gradient hook"):
        BookKeeping({"w": parameter}).observe(lambda samples: None)


def test_derived_tensor_that_is_used_and_then_overwritten() -> None:
    def overwritten(m: Any, x: Tensor) -> Tensor:
        w = m.w.exp()
        out = x * w[0]
        w[1] *= 2
        return out + x * w[1]

    refused_raw(overwritten, (5,), "shares memory with a tensor that was written in place", w=rand(2, 5))


def test_view_of_a_constant_that_parameters_are_written_into() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(2, 5, dtype=x.dtype)
        row = table[0]
        table[0] = m.w
        return x * row + x @ table.T @ table

    refused_raw(written, (5,), "'w' received a gradient that is not in the book", w=rand(5))


def test_constant_of_which_a_view_is_written_into() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(2, 5, dtype=x.dtype)
        table[0].copy_(m.w)
        return x * table[0] * m.w

    refused_raw(written, (5,), "'w' received a gradient that is not in the book", w=rand(5))


def test_in_place_on_a_parameter_written_by_the_batch() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        table = m.w.clone()
        table[0] = x[0]
        return x * table[1]

    refused_raw(written, (5,), "'__setitem__' writes in place", w=rand(2, 5))


def test_out_argument() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = torch.empty_like(x)
        try:
            return torch.mul(x, m.w, out=out)
        except RuntimeError as error:  # torch itself refuses out= where a gradient is needed
            raise UnsupportedModelError(f"writes in place: {error}") from error

    refused_raw(written, (5,), "writes in place", w=rand(5))


def test_complex_parameter() -> None:
    model = Raw(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=5), w=torch.randn(3, dtype=torch.complex64))
    with pytest.raises(UnsupportedModelError, match="'w' is complex .* use torch.view_as_complex"):
        keeping_of(model, reals(5)())


def test_gradient_penalty() -> None:
    def penalised(m: nn.Module, b: Batch) -> Tensor:
        x = b["x"].clone().requires_grad_()
        out = m(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.mean(1).mean() + (gradient.norm(dim=1) - 1).square().mean()

    refused(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), reals(5), "create_graph=True", penalised
    )


def test_inner_gradient_of_the_parameters() -> None:
    def adapted(m: nn.Module, b: Batch) -> Tensor:
        (gradient,) = torch.autograd.grad(mean_loss(m, b), [m.weight], create_graph=True)
        return F.linear(b["x"], m.weight - gradient).cos().mean(1).mean()

    refused(lambda: nn.Linear(5, 3, bias=False), reals(5), "torch.autograd.grad|reduced over the batch", adapted)


def test_derived_tensor_kept_for_the_next_step() -> None:
    torch.manual_seed(0)
    cache: list[Tensor] = []

    def cached(m: Any, x: Tensor) -> Tensor:
        if not cache or m.fresh:
            cache[:] = [m.w.t() * 2]
        return x @ cache[0] + x @ m.w.t()

    model, batch = Raw(cached, w=rand(3, 5)), reals(5)()
    model.fresh = True
    keeping = keeping_of(model, batch)
    for fresh in (True, False):
        model.fresh = fresh
        keeping_pass = keeping.recording(4)
        if fresh:
            with keeping_pass:
                mean_loss(model, batch).backward()
            keeping.close()
        else:
            with pytest.raises(UnsupportedModelError, match="computed in an earlier pass"), keeping_pass:
                mean_loss(model, batch).backward()


def test_traced_tensor_kept_for_the_next_step() -> None:
    torch.manual_seed(0)
    cache: list[Tensor] = []

    def cached(m: Any, x: Tensor) -> Tensor:
        if not cache:
            cache.append(m.w.t() * 2)
        return x @ cache[0] + x @ m.w.t()

    model, batch = Raw(cached, w=rand(3, 5)), reals(5)()
    keeping = keeping_of(model, batch)
    assert type(cache[0]) is Tensor
    with keeping.recording(4):
        mean_loss(model, batch).backward()
    with pytest.raises(UnsupportedModelError, match="'w' received a gradient that is not in the book"):
        keeping.close()


def test_layouts_that_differ_in_a_recomputation() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        def sample_first(h: Tensor) -> Tensor:
            return m.f(h.flatten(0, 1)).unflatten(0, (-1, 3))

        def row_first(h: Tensor) -> Tensor:
            return m.f(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1)

        h = m.e(x)
        for part in (sample_first, row_first):
            h = torch.utils.checkpoint.checkpoint(part, h, use_reentrant=m.reentrant)
        return h

    for reentrant in (False, True):

        def build(reentrant: bool = reentrant) -> nn.Module:
            model = Raw(twice, e=nn.Linear(5, 5), f=nn.Linear(5, 5))
            model.reentrant = reentrant
            return model

        refused(build, reals(3, 5), "in another number or order")


def test_layouts_that_differ_and_a_use_left_out() -> None:
    torch.manual_seed(0)

    def some(m: Any, x: Tensor) -> Tensor:
        h = x
        if not m.skip:
            h = m.f(h.flatten(0, 1)).unflatten(0, (-1, 3))
        return m.f(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1)

    model, batch = Raw(some, f=nn.Linear(5, 5)), reals(3, 5)()
    model.skip = False
    keeping = keeping_of(model, batch)
    model.skip = True
    with keeping.recording(4):
        mean_loss(model, batch).backward()
    with pytest.raises(UnsupportedModelError, match="in another number or order"):
        keeping.close()


def test_loop_over_the_samples() -> None:
    refused_raw(
        lambda m, x: torch.stack([xi * m.w for xi in x]),
        (5,),
        r"ran other functions for two samples .*'mul' was the first that differed, in .*test_refusals.py:\d+.*'loop'",
        w=rand(5),
    )


def test_rows_that_do_not_divide() -> None:
    torch.manual_seed(0)
    model, batch = Raw(lambda m, x: m.f(x.flatten(0, 1)[: m.count]), f=nn.Linear(5, 3)), reals(3, 5)()
    model.count = None
    keeping = keeping_of(model, batch)
    model.count = 11
    match = "'linear' of 'f.weight', 'f.bias' .*does not divide so among the 4 samples"
    with pytest.raises(UnsupportedModelError, match=match), keeping.recording(4):
        model(batch["x"]).sum().backward()


def test_backward_for_other_tensors_only() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), reals(5)()
    keeping = keeping_of(model, batch)
    with keeping.recording(4):
        x = batch["x"].requires_grad_()
        mean_loss(model, {"x": x}).backward(inputs=[x])
    with pytest.raises(UnsupportedModelError, match="no gradient came back to any trained parameter"):
        keeping.close()


def test_backward_after_close() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), reals(5)()
    keeping = keeping_of(model, batch)
    with keeping.recording(4):
        loss = mean_loss(model, batch)
        loss.backward(retain_graph=True)
    keeping.close()
    with pytest.raises(UnsupportedModelError, match="whose book was closed"):
        loss.backward()


def test_misuse_of_the_engine() -> None:
    keeping = BookKeeping(dict(nn.Linear(5, 3).named_parameters()))
    with pytest.raises(RuntimeError, match="close\\(\\) ends a pass, and none was begun"):
        keeping.close()
    with pytest.raises(RuntimeError, match="continues a pass, and none was begun"), keeping.recording():
        pass
    with keeping.recording(3):
        pass
    keeping.abandon()
    with pytest.raises(RuntimeError, match="none was begun"):
        keeping.close()
