"""The book of every case equals the oracle."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dp.bookkeeping import BookKeeping
from tests.bookkeeping import more_cases  # noqa: F401 - joins the list
from tests.bookkeeping.cases import CASES, SMALL, Raw, attention_loss, mean_loss, rand, reals, recurrent_loss
from tests.bookkeeping.families import FAMILIES
from tests.bookkeeping.oracle import Case, book_of, check, compare, loss_of, observed, reference, to_dtype
from tests.bookkeeping.recurrent_cases import RECURRENT_CASES


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", [*CASES, *RECURRENT_CASES], ids=lambda case: case.name)
def test_book_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in FAMILIES]
)
def test_book_of_other_libraries_models_equals_the_oracle(case: Case) -> None:
    check(case)


RANDOM = [
    Case("LSTM", lambda: nn.LSTM(4, 3, 2, dropout=0.5), reals(5, 4), recurrent_loss),
    Case("attention", lambda: nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True), reals(3, 6), attention_loss),
    Case("transformer", lambda: nn.TransformerEncoderLayer(**{**SMALL, "dropout": 0.5}), reals(3, 6), mean_loss),
    Case(
        "attention-bias",
        lambda: Raw(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.b, dropout_p=0.5), b=rand(3, 3)),
        reals(3, 5),
        mean_loss,
    ),
]
RANDOM += [
    Case(
        f"checkpoint-reentrant={reentrant}",
        lambda r=reentrant: Raw(
            lambda m, x: checkpoint(lambda h: F.dropout(m.f(h)) * m.p, x * m.p, use_reentrant=r),
            f=nn.Linear(5, 5),
            p=rand(5),
        ),
        reals(3, 5),
        mean_loss,
    )
    for reentrant in (False, True)
]


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_sum_of_the_book_equals_the_gradient_under_dropout(case: Case) -> None:
    """A batch of one would draw other masks: so the sum over the samples is compared, of one and the same draw."""
    torch.manual_seed(0)
    model, batch = case.build().double(), to_dtype(case.batch(), torch.float64)
    named = dict(model.named_parameters())
    book = book_of(case, model, batch, observed(case, model, batch, named, {}))
    sums = book.weighted_sums(torch.ones(4, dtype=torch.float64))
    loss_of(case, model, batch).backward()
    for name, parameter in named.items():
        torch.testing.assert_close(sums[name], parameter.grad)


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        pytest.param(lambda h: h, 3, id="nothing"),
        pytest.param(lambda h: F.dropout(h, 0.5), 3, id="a mask for every sample"),
        pytest.param(lambda h: h + torch.randn(h.shape).to(h), 3, id="noise for every sample"),
        pytest.param(lambda h: h * torch.rand(()).to(h), 12, id="one number for all"),
        pytest.param(lambda h: h * torch.rand(len(h), 1).to(h), 12, id="a number for every sample"),
    ],
)
def test_only_what_may_be_decided_at_random_is_observed_again(function: object, passes: int) -> None:
    torch.manual_seed(0)
    model = Raw(lambda m, x: function(m.f(x)), f=nn.Linear(5, 64))  # type: ignore[operator]
    seen = []

    def forward(samples: str) -> torch.Tensor:
        seen.append(samples)
        return model(torch.stack([torch.full((5,), float(ord(s))) for s in samples])).square().mean()

    BookKeeping(dict(model.named_parameters())).observe(forward)
    assert len(seen) == passes  # three of each round


def test_sequence_lengths_and_batch_sizes_that_change_from_step_to_step() -> None:
    torch.manual_seed(0)

    def time_major(m: Raw, x: torch.Tensor) -> torch.Tensor:
        h = m.g(m.f(x.transpose(0, 1).flatten(0, 1)).relu())
        return h.unflatten(0, (x.shape[1], -1)).transpose(0, 1) + m.t[: x.shape[1]]

    model = Raw(time_major, f=nn.Linear(5, 6), g=nn.LayerNorm(6), t=rand(9, 6)).double()
    case, named = Case("lengths", lambda: model, lambda: {}, mean_loss), dict(model.named_parameters())
    keeping = observed(case, model, {"x": torch.randn(2, 3, 5).double()}, named, {})
    for size, length in ((4, 3), (4, 4), (5, 7), (1, 1), (3, 1), (7, 2), (2, 3)):
        batch = {"x": torch.randn(size, length, 5).double()}
        compare(case, book_of(case, model, batch, keeping), *reference(case, model, batch, named))


@pytest.mark.parametrize("trained", ["bias", "weight"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.GroupNorm(1, 3), nn.ConvTranspose1d(3, 2, 2)
        ),
    ],
)
def test_nothing_is_saved_for_a_frozen_weight(build: object, trained: str) -> None:
    """Training the biases alone must not keep the inputs of layers; the same hooks see them where weights train."""
    torch.manual_seed(0)
    model = build()
    first = next(m for m in model.modules() if hasattr(m, "weight"))
    first.weight.requires_grad_(trained == "weight")
    named = {n: q for n, q in first.named_parameters() if n == trained}
    keeping, x, saved = BookKeeping(named), torch.randn(4, 5), []
    keeping.observe(lambda samples: model(torch.stack([x["ab".index(s)] for s in samples])).sum())
    inputs: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), keeping.recording(4):
        first(model[0](x) if first is not model[0] else x).sum().backward()
    assert (inputs[-1].data_ptr() in saved) == (trained == "weight")
    assert set(keeping.close().entries) == {trained}


def test_a_backward_pass_inside_autocast_is_as_accurate_as_outside() -> None:
    """As under manual optimization: the same entries, norms and sums, of the same forward pass in 16 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 6, 5)), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(48, 30), nn.Linear(30, 2)
    )
    x, found = torch.randn(4, 30), []
    for inside in (True, False):
        keeping = BookKeeping(dict(net.named_parameters()))
        keeping.observe(lambda samples: net(x[["ab".index(s) for s in samples]]).square().sum())
        with torch.autocast("cpu", torch.bfloat16), keeping.recording(4):
            loss = net(x).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            with keeping.recording():
                loss.backward()
            book = keeping.close()
            found.append([book.norm_sq(), *book.weighted_sums(torch.rand(4, generator=torch.Generator())).values()])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_parameter_under_two_names() -> None:
    layer, x = nn.Linear(5, 5), torch.randn(4, 5)
    keeping = BookKeeping({"one": layer.weight, "two": layer.weight}, {"three": layer.weight, "bias": layer.bias})
    keeping.observe(lambda samples: layer(torch.stack([x["ab".index(s)] for s in samples])).mean())
    with keeping.recording(4):
        layer(x).mean().backward()
    assert len(keeping.close().entries) == 1
    assert type(layer.weight) is type(layer.bias) is nn.Parameter


def test_classes_are_restored_after_an_error_and_the_next_pass_is_right() -> None:
    torch.manual_seed(0)
    case = Case("error", lambda: nn.Linear(5, 3).double(), reals(5), mean_loss)
    model, batch = case.build(), to_dtype(case.batch(), torch.float64)
    named = dict(model.named_parameters())
    keeping = observed(case, model, batch, named, {})
    with pytest.raises(ZeroDivisionError), keeping.recording(4):
        model(batch["x"]).mul(1 / 0)
    assert type(model.weight) is nn.Parameter
    compare(case, book_of(case, model, batch, keeping), *reference(case, model, batch, named))


def test_observation_leaves_the_random_generators_alone() -> None:
    model, x = nn.Sequential(nn.Linear(5, 3), nn.Dropout()), torch.randn(4, 5)
    before = torch.get_rng_state()
    BookKeeping(dict(model.named_parameters())).observe(
        lambda samples: model(torch.stack([x["ab".index(s)] for s in samples])).sum()
    )
    assert torch.equal(torch.get_rng_state(), before)


HELD = ("linear-3d-bias=False", "cat-of-weights", "position-table", "attention-causal")


def memory_held() -> set[int]:
    """Return where in memory the tensors are that live."""
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor) and held.numel() > 1]
    return {held.untyped_storage().data_ptr() for held in tensors}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in HELD], ids=lambda case: case.name)
def test_what_a_pass_held_is_freed_with_its_book(case: Case) -> None:
    """Not when the garbage collector runs, which may be many physical batches later."""
    model, batch = case.build().double(), to_dtype(case.batch(), torch.float64)
    keeping = observed(case, model, batch, dict(model.named_parameters()), {})
    book_of(case, model, batch, keeping)
    gc.collect()
    gc.disable()
    try:
        before = memory_held()
        book = book_of(case, model, batch, keeping)
        held = len(memory_held() - before)
        del book
        left = len(memory_held() - before)
    finally:
        gc.enable()
    assert held > 0
    assert left == 0
