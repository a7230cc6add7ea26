"""One list of models whose book must equal the oracle's; every place where per-sample gradients are known to go wrong.

A batch holds four samples. Sizes of other axes are chosen unequal, but for the cases that are about equal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.bookkeeping.oracle import Batch, Case

B = 4
CASES: list[Case] = []


class Raw(nn.Module):
    """Raw parameters and a function of them: ``forward(x) = function(self, x)``."""

    def __init__(self, function: Callable[..., Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member * 1.0))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def rand(*shape: int) -> Tensor:
    """Return random parameter values."""
    return torch.randn(shape) * 0.5


def reals(*shape: int) -> Callable[[], Batch]:
    """Return a batch of real samples of a shape."""
    return lambda: {"x": torch.randn(B, *shape)}


def ids(*shape: int, vocab: int = 7) -> Callable[[], Batch]:
    """Return a batch of ids, many of them repeated."""
    return lambda: {"x": torch.randint(0, vocab, (B, *shape))}


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over the samples of a curved function of the output."""
    return (model(batch["x"]).flatten(1).cos() + 1.5).square().mean(1).mean()


def time_major_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a model that wants and returns ``[T, B, d]``."""
    return (model(batch["x"].transpose(0, 1)).transpose(0, 1).flatten(1).cos() + 1.5).square().mean(1).mean()


def add(
    name: str, build: Callable[[], nn.Module], batch: Callable[[], Batch], loss: Any = mean_loss, **rest: Any
) -> None:
    """Add a case."""
    CASES.append(Case(name, build, batch, loss, **rest))


def raw(
    name: str, function: Callable[..., Tensor], batch: Callable[[], Batch], loss: Any = mean_loss, **rest: Any
) -> None:
    """Add a case of raw parameters; members that are functions are called anew for every model."""
    options = {k: rest.pop(k) for k in ("dtype", "autocast", "sizes", "tolerance", "trained") if k in rest}

    def build() -> nn.Module:
        return Raw(function, **{k: v() if callable(v) and not isinstance(v, nn.Module) else v for k, v in rest.items()})

    add(name, build, batch, loss, **options)


def p(*shape: int) -> Callable[[], Tensor]:
    """Return the recipe of a raw parameter."""
    return lambda: rand(*shape)


# --- linear ---------------------------------------------------------------------------------------------------------
for rank, shape in enumerate([(5,), (3, 5), (2, 3, 5), (2, 3, 2, 5)], 2):
    for bias in (True, False):
        add(f"linear-{rank}d-bias={bias}", lambda bias=bias: nn.Linear(5, 6, bias=bias), reals(*shape))
for depth in (1, 2, 3):
    add(
        f"mlp-{depth}-inplace-relu",
        lambda depth=depth: nn.Sequential(
            *[m for _ in range(depth) for m in (nn.Linear(5, 5), nn.ReLU(inplace=True))], nn.Linear(5, 3)
        ),
        reals(5),
    )
add("linear-long-sequence", lambda: nn.Linear(3, 2), reals(40, 3))
add("linear-long-sequence-float32", lambda: nn.Linear(3, 2), reals(40, 3), dtype=torch.float32)
add(
    "bilinear",
    lambda: nn.Bilinear(5, 3, 4),
    lambda: {"x": torch.randn(B, 2, 5), "z": torch.randn(B, 2, 3)},
    lambda m, b: m(b["x"], b["z"]).flatten(1).cos().mean(1).mean(),
)
raw("addmm", lambda m, x: torch.addmm(m.b, x, m.w), reals(5), w=p(5, 3), b=p(3))
raw("addmm-scaled", lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), reals(5), w=p(5, 3), b=p(3))
raw("addmm-bias-of-one", lambda m, x: torch.addmm(m.b, x, m.w), reals(5), w=p(5, 3), b=p(1))
raw("linear-bias-of-one", lambda m, x: F.linear(x, m.w, m.b), reals(5), w=p(3, 5), b=p(1))
raw("matmul", lambda m, x: torch.matmul(x, m.w), reals(3, 5), w=p(5, 3))
raw("matmul-operator", lambda m, x: x @ m.w, reals(3, 5), w=p(5, 3))
raw("matmul-vector", lambda m, x: x @ m.w, reals(3, 5), w=p(5))
raw("matmul-batched-weight", lambda m, x: x @ m.w, reals(2, 3, 5), w=p(2, 5, 4))
raw("mm", lambda m, x: torch.mm(x, m.w), reals(5), w=p(5, 3))
raw("bmm-expanded", lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), reals(3, 5), w=p(1, 5, 4))
raw("baddbmm", lambda m, x: torch.baddbmm(m.b, x, x.mT @ x + m.w), reals(3, 3), w=p(3, 3), b=p(1, 1, 3))
raw("left-parameter", lambda m, x: m.w @ x, reals(5, 3), w=p(4, 5))
raw("left-parameter-rmatmul", lambda m, x: (m.w @ x.T).T, reals(5), w=p(4, 5))
raw("einsum", lambda m, x: torch.einsum("btd,dp->btp", x, m.w), reals(3, 5), w=p(5, 4))
raw("einsum-heads", lambda m, x: torch.einsum("btd,hde->bhte", x, m.w), reals(3, 5), w=p(2, 5, 4))
raw("tensordot", lambda m, x: torch.tensordot(x, m.w, dims=([2], [0])), reals(3, 5), w=p(5, 4))
raw("outer-of-parameters", lambda m, x: x * torch.outer(m.u, m.v), reals(3, 5), u=p(3), v=p(5))
raw("functional-linear-kwargs", lambda m, x: F.linear(bias=m.b, weight=m.w, input=x), reals(5), w=p(3, 5), b=p(3))
raw("add-kwargs", lambda m, x: torch.add(other=m.b, input=x, alpha=3), reals(3, 5), b=p(5))
raw("cat-of-weights", lambda m, x: F.linear(x, torch.cat([m.w, m.v])), reals(5), w=p(3, 5), v=p(2, 5))
raw(
    "vector-of-parameters",
    lambda m, x: x @ nn.utils.parameters_to_vector(m.parameters())[:5],
    reals(3, 5),
    w=p(3),
    v=p(4),
)

# --- tied and reused ------------------------------------------------------------------------------------------------
raw("tied-functional", lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), reals(5), w=p(5, 5))
raw("tied-transpose", lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), reals(5), w=p(3, 5))
raw("tied-transpose-sequence", lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), reals(30, 5), w=p(3, 5))
raw("tied-transposition-kwargs", lambda m, x: F.linear(x @ m.w, m.w.transpose(dim0=0, dim1=1).mT), reals(5), w=p(5, 5))


class Tied(nn.Module):
    """An embedding and an output head that share their weight."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, **options)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)).tanh())


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a language model."""
    return F.cross_entropy(model(batch["x"])[:, :-1].flatten(0, 1), batch["x"][:, 1:].flatten())


add("tied-embedding-head", Tied, ids(6), next_token_loss)
add("tied-embedding-head-padding", lambda: Tied(padding_idx=0), ids(6), next_token_loss)
add("tied-embedding-head-float32", Tied, ids(6), next_token_loss, dtype=torch.float32)
raw("called-twice", lambda m, x: m.f(m.f(x).relu()), reals(5), f=lambda: nn.Linear(5, 5))
raw("called-twice-same-input", lambda m, x: m.f(x) * m.f(x), reals(5), f=lambda: nn.Linear(5, 5))
raw("cancelling-uses", lambda m, x: m.f(x) - m.f(x + 1e-3), reals(5), f=lambda: nn.Linear(5, 5), tolerance=1e-8)
raw(
    "reused-with-other-lengths",
    lambda m, x: torch.cat([m.f(x), m.f(x[:, :2]), m.f(x[:, 0]).unsqueeze(1)], 1),
    reals(3, 5),
    f=lambda: nn.Linear(5, 4),
)
raw(
    "reused-batch-first-and-time-major",
    lambda m, x: m.f(m.f(x).relu().transpose(0, 1)).transpose(0, 1),
    reals(3, 5),
    f=lambda: nn.Linear(5, 5),
)
raw(
    "reused-sample-first-and-row-first",
    lambda m, x: (
        m.f(m.f(x.flatten(0, 1)).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1).relu())
        .unflatten(0, (3, -1))
        .transpose(0, 1)
    ),
    reals(3, 5),
    f=lambda: nn.Linear(5, 5),
)
raw(
    "constant-use-first-in-no-grad",
    lambda m, x: no_grad_use(m, x.transpose(0, 1).flatten(0, 1)) + m.f(x.flatten(0, 1)).unflatten(0, (-1, 3)).square(),
    reals(3, 5),
    f=lambda: nn.Linear(5, 5),
)


def no_grad_use(model: nn.Module, x: Tensor) -> Tensor:
    """Use a layer without a gradient, on samples in another place."""
    with torch.no_grad():
        return model.f(x).unflatten(0, (3, -1)).transpose(0, 1)


# --- raw parameters -------------------------------------------------------------------------------------------------
def with_token(token: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a model that prepends a token."""
    return lambda m, x: m.f(torch.cat([token(m, x), x], 1)).tanh()


linear5: Callable[[], nn.Module] = lambda: nn.Linear(5, 4)  # noqa: E731
raw("class-token-expand", with_token(lambda m, x: m.t.expand(x.shape[0], -1, -1)), reals(3, 5), t=p(1, 1, 5), f=linear5)
raw("class-token-repeat", with_token(lambda m, x: m.t.repeat(x.shape[0], 1, 1)), reals(3, 5), t=p(1, 1, 5), f=linear5)
raw("class-token-stack", with_token(lambda m, x: torch.stack([m.t] * len(x))), reals(3, 5), t=p(1, 5), f=linear5)
raw("class-token-cat", with_token(lambda m, x: torch.cat([m.t] * len(x))), reals(3, 5), t=p(1, 1, 5), f=linear5)
raw("class-token-new-axis", with_token(lambda m, x: m.t[None].expand(len(x), 2, 5)), reals(3, 5), t=p(2, 5), f=linear5)
raw("class-token-expand-as", with_token(lambda m, x: m.t.expand_as(x)), reals(3, 5), t=p(1, 1, 5), f=linear5)
raw("class-token-tile", with_token(lambda m, x: torch.tile(m.t, (len(x), 1, 1))), reals(3, 5), t=p(1, 1, 5), f=linear5)
raw("expand-vector", lambda m, x: x * m.t.expand(x.shape[0], 5), reals(5), t=p(5))
raw("expand-vector-twice", lambda m, x: x * m.t.expand(x.shape[0], 3, 5), reals(3, 5), t=p(5))
raw("expand-vector-thrice", lambda m, x: x * m.t.expand(len(x), 2, 3, 5), reals(2, 3, 5), t=p(1, 5))
raw("expand-scalar", lambda m, x: x * m.t.expand(len(x), 5), reals(5), t=p())
raw("expand-time-major", lambda m, x: x * m.t.expand(3, len(x), 5).transpose(0, 1), reals(3, 5), t=p(1, 1, 5))
raw("broadcast-to", lambda m, x: x * torch.broadcast_to(m.t, x.shape), reals(3, 5), t=p(3, 1))
raw("broadcast-tensors", lambda m, x: torch.mul(*torch.broadcast_tensors(x, m.t)), reals(3, 5), t=p(3, 1))
raw("repeat-interleave", lambda m, x: x * m.t.repeat_interleave(len(x), 0), reals(5), t=p(1, 5))
raw("position-table", lambda m, x: m.f(x + m.t[:, : x.shape[1]]), reals(3, 5), t=p(1, 8, 5), f=linear5)
raw("position-table-of-batch-size", lambda m, x: m.f(x + m.t[:, : x.shape[1]]), reals(B, 5), t=p(1, 8, 5), f=linear5)
raw(
    "position-embedding-of-ids",
    lambda m, x: m.f(x + m.e(torch.arange(x.shape[1])[None])),
    reals(3, 5),
    e=lambda: nn.Embedding(8, 5),
    f=linear5,
)
raw(
    "position-embedding-of-batch-size",
    lambda m, x: m.f(x + m.e(torch.arange(x.shape[1]))),
    reals(B, 5),
    e=lambda: nn.Embedding(8, 5),
    f=linear5,
)
raw(
    "position-embedding-expanded",
    lambda m, x: m.f(x + m.e(torch.arange(3).expand(len(x), 3))),
    reals(3, 5),
    e=lambda: nn.Embedding(8, 5),
    f=linear5,
)
raw(
    "relative-position-bias",
    lambda m, x: (x @ x.mT + m.t[(torch.arange(3)[:, None] - torch.arange(3)) % 5]).softmax(-1) @ m.f(x),
    reals(3, 5),
    t=p(5),
    f=linear5,
)
raw("layer-scale", lambda m, x: x + m.g * m.f(x), reals(3, 5), g=p(5), f=lambda: nn.Linear(5, 5))
raw("scalar-temperature", lambda m, x: (x * m.t.exp()).softmax(-1), reals(3, 5), t=p())
raw("scalar-divisor", lambda m, x: 1 / (m.t.abs() + x.square()) + 2**m.t, reals(3, 5), t=p())
raw(
    "plus-equals",
    lambda m, x: in_place(m, x, lambda h: h.__iadd__(m.t)),
    reals(3, 5),
    t=p(5),
    f=lambda: nn.Linear(5, 5),
)
raw("add-in-place", lambda m, x: in_place(m, x, lambda h: h.add_(m.t)), reals(3, 5), t=p(5), f=lambda: nn.Linear(5, 5))
raw("add-in-place-to-input", lambda m, x: x.clone().add_(m.t).cos(), reals(3, 5), t=p(5))
raw(
    "add-in-place-to-view",
    lambda m, x: in_place(m, x, lambda h: h[:, 1].add_(m.t)),
    reals(3, 5),
    t=p(5),
    f=lambda: nn.Linear(5, 5),
)
raw("mul-in-place", lambda m, x: in_place(m, x, lambda h: h.mul_(m.t)), reals(3, 5), t=p(5), f=lambda: nn.Linear(5, 5))
raw(
    "copy-in-place",
    lambda m, x: in_place(m, x, lambda h: h[:, 0].copy_(m.t)),
    reals(3, 5),
    t=p(5),
    f=lambda: nn.Linear(5, 5),
)
raw(
    "set-item",
    lambda m, x: in_place(m, x, lambda h: h.__setitem__((slice(None), 0), m.t)),
    reals(3, 5),
    t=p(5),
    f=lambda: nn.Linear(5, 5),
)
raw(
    "addcmul-in-place",
    lambda m, x: in_place(m, x, lambda h: h.addcmul_(m.t, x)),
    reals(3, 5),
    t=p(5),
    f=lambda: nn.Linear(5, 5),
)


def in_place(model: nn.Module, x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """Write into an activation and do not use what the function returns."""
    h = model.f(x) + 0
    write(h)
    return h.cos()


raw("add-then-in-place", lambda m, x: after_add(m, x), reals(3, 5), t=p(5), f=lambda: nn.Linear(5, 5))


def after_add(model: nn.Module, x: Tensor) -> Tensor:
    """Overwrite a summand, which an addition need not save."""
    h = model.f(x)
    y = h + model.t
    h.mul_(2)
    return y.cos() * h


raw("where", lambda m, x: torch.where(x > 0, x, m.t), reals(3, 5), t=p(5))
raw("masked-token", lambda m, x: torch.where(x[..., :1] > 0, m.t, x), reals(3, 5), t=p(1, 1, 5))
raw("lerp", lambda m, x: torch.lerp(x, m.t, m.a), reals(3, 5), t=p(5), a=p())
raw("unbound-parameter", lambda m, x: x * m.t.unbind()[0] + m.t.unbind()[1], reals(3, 5), t=p(2, 5))
raw("iterated-parameter", lambda m, x: sum(x * row for row in m.t), reals(3, 5), t=p(2, 5))
raw(
    "chunked-parameter",
    lambda m, x: F.linear(x, *m.w.split([3, 3])[:1]) + F.linear(x, m.w.chunk(2)[1]),
    reals(5),
    w=p(6, 5),
)
raw("viewed-parameter", lambda m, x: F.linear(x, m.w.view(3, 5)), reals(5), w=p(15))
raw("same-slice-twice", lambda m, x: x * m.t[0] + x.cos() * m.t[0] + m.t[1], reals(5), t=p(2, 5))
raw("advanced-index", lambda m, x: m.t[x] * 2, ids(3), t=p(7, 5))
raw("index-select", lambda m, x: m.t.index_select(0, x.flatten()).unflatten(0, x.shape), ids(3), t=p(7, 5))
raw("gather", lambda m, x: m.t.expand(len(x), -1).gather(1, x), ids(3), t=p(7))
raw("take-along", lambda m, x: torch.take(m.t, x), ids(3), t=p(7))
raw("cast-parameter", lambda m, x: F.linear(x, m.w.to(x.dtype).contiguous().clone()), reals(5), w=p(3, 5))
raw("parameter-as-dtype", lambda m, x: m.f(x.type_as(m.f.weight)).cos(), reals(5), f=linear5)
raw(
    "zeros-from-parameter",
    lambda m, x: m.f(torch.cat([m.f.weight.new_zeros(len(x), 1, 5), x], 1)),
    reals(3, 5),
    f=linear5,
)
raw("parameter-data", lambda m, x: m.f(x) * m.f.weight.data.norm() * m.f.weight.detach().sum(), reals(5), f=linear5)
raw("parameter-shape", lambda m, x: m.f(x).reshape(-1, m.f.weight.size(0)), reals(5), f=linear5)
raw("normalized-weight", lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), reals(5), w=p(3, 5))
raw("cosine-similarity", lambda m, x: F.cosine_similarity(x[:, None], m.w[None], dim=-1), reals(5), w=p(3, 5))
raw("distances", lambda m, x: torch.cdist(x, m.w), reals(3, 5), w=p(4, 5))
raw(
    "attention-queries",
    lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), m.k(x), x),
    reals(3, 5),
    q=p(1, 2, 5),
    k=lambda: nn.Linear(5, 5),
)
raw("attention-bias", lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.b), reals(3, 5), b=p(3, 3))
raw("list-argument", lambda m, x: torch.cat((x, [m.f(x)][0]), -1), reals(5), f=linear5)
raw("max-with-parameter", lambda m, x: torch.maximum(x, m.t) + torch.max(x, m.t), reals(3, 5), t=p(5))
raw(
    "two-outputs",
    lambda m, x: sum(torch.split(torch.cat([x, m.t.expand(len(x), 5)], 1) * m.s, 5, 1)),
    reals(5),
    t=p(5),
    s=p(10),
)

# --- convolutions ---------------------------------------------------------------------------------------------------
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2, "bias": False},
    {"groups": 2, "padding": 1},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 2},
    {"padding": "same", "kernel_size": 4, "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
]
for rank in (1, 2, 3):
    for option in OPTIONS:
        label = ",".join(f"{k}={v}" for k, v in option.items())
        add(
            f"conv{rank}d-{label}",
            lambda rank=rank, option=option: CONV[rank](4, 6, **{"kernel_size": 3, **option}),
            reals(4, *(9, 7, 6)[:rank]),
        )
    for option in ({}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2, "dilation": 2, "bias": False}):
        label = ",".join(f"{k}={v}" for k, v in option.items())
        add(
            f"transposed-conv{rank}d-{label}",
            lambda rank=rank, option=option: TRANSPOSED[rank](4, 6, 3, **option),
            reals(4, *(4, 5, 3)[:rank]),
        )
add("conv2d-depthwise", lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), groups=4), reals(4, 6, 5))
add(
    "conv2d-few-positions",
    lambda: nn.Sequential(nn.Conv2d(40, 60, 3, padding=1), nn.Conv2d(60, 50, 2)),
    reals(40, 3, 3),
)
add(
    "conv2d-of-frames",
    lambda: Raw(lambda m, x: m.f(x.flatten(0, 1)).unflatten(0, (-1, 3)), f=nn.Conv2d(2, 3, 2)),
    reals(3, 2, 4, 4),
)
add(
    "conv2d-of-frames-time-major",
    lambda: Raw(
        lambda m, x: m.f(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1), f=nn.Conv2d(2, 3, 2)
    ),
    reals(3, 2, 4, 4),
)
raw("conv2d-shared", lambda m, x: m.f(m.f(x).relu()), reals(3, 5, 5), f=lambda: nn.Conv2d(3, 3, 3, padding=1))
raw(
    "conv2d-weight-and-head",
    lambda m, x: m.f(x).mean((2, 3)) @ m.f.weight.flatten(1),
    reals(3, 5, 5),
    f=lambda: nn.Conv2d(3, 4, 2),
)
raw(
    "conv2d-standardized",
    lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True)),
    reals(3, 5, 5),
    w=p(4, 3, 2, 2),
)
raw(
    "conv2d-functional",
    lambda m, x: F.conv2d(x, m.w, None, (2, 1), padding=[1, 0], groups=1),
    reals(3, 5, 5),
    w=p(4, 3, 2, 2),
)
raw("conv1d-unbatched-parameter", lambda m, x: F.conv1d(m.x, m.w) + x, reals(4, 3), w=p(4, 2, 3), x=p(2, 5))
raw(
    "conv2d-parameter-image",
    lambda m, x: F.conv2d(m.x, m.w) * x.mean(),
    reals(),
    w=p(4, 2, 3, 3),
    x=p(1, 2, 5, 5),
    loss=lambda m, b: (m.function(m, torch.ones(3)).mean() * b["x"].cos()).mean(),
)
add(
    "cnn",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2),
        nn.ReLU(True),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
    reals(3, 6, 6),
)
add(
    "pixel-shuffle",
    lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 1, 1)),
    reals(2, 3, 4),
)

# --- tables ---------------------------------------------------------------------------------------------------------
for rank, shape in enumerate([(), (6,), (3, 2)], 1):
    add(f"embedding-{rank}d", lambda: nn.Embedding(7, 5), ids(*shape))
    for padding in (0, -1):
        add(
            f"embedding-{rank}d-padding={padding}",
            lambda padding=padding: nn.Embedding(7, 5, padding_idx=padding),
            ids(*shape),
        )
add(
    "embedding-flattened",
    lambda: Raw(lambda m, x: m.f(x.flatten()).unflatten(0, x.shape), f=nn.Embedding(7, 5)),
    ids(6),
)
add(
    "embedding-time-major",
    lambda: Raw(lambda m, x: m.f(x.t().flatten()).unflatten(0, (6, -1)).transpose(0, 1), f=nn.Embedding(50, 5)),
    ids(6, vocab=50),
)
for mode in ("sum", "mean", "max"):
    add(f"embedding-bag-{mode}", lambda mode=mode: nn.EmbeddingBag(7, 5, mode=mode), ids(6))
    add(
        f"embedding-bag-{mode}-offsets",
        lambda mode=mode: Raw(
            lambda m, x: m.f(x.flatten(), torch.arange(len(x)) * 6), f=nn.EmbeddingBag(7, 5, mode=mode)
        ),
        ids(6),
    )
add("embedding-bag-padding", lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=0), ids(6))
add(
    "embedding-bag-weighted",
    lambda: nn.EmbeddingBag(7, 5, mode="sum"),
    lambda: {"x": torch.randint(0, 7, (B, 6)), "w": rand(B, 6)},
    lambda m, b: m(b["x"], per_sample_weights=b["w"]).cos().mean(1).mean(),
)
add(
    "embedding-bag-trained-weights",
    lambda: Raw(
        lambda m, x: m.f(x, per_sample_weights=m.w.expand(len(x), 6)), f=nn.EmbeddingBag(7, 5, mode="sum"), w=rand(6)
    ),
    ids(6),
)

# --- normalisation --------------------------------------------------------------------------------------------------
add("layer-norm", lambda: nn.LayerNorm(5), reals(3, 5))
add("layer-norm-2-axes", lambda: nn.LayerNorm((3, 5)), reals(2, 3, 5))
add("layer-norm-no-bias", lambda: nn.LayerNorm(5, bias=False), reals(5))
add("layer-norm-time-major", lambda: nn.LayerNorm(5), reals(3, 5), time_major_loss)
add("rms-norm", lambda: nn.RMSNorm(5), reals(3, 5))
add(
    "rms-norm-by-hand",
    lambda: Raw(lambda m, x: m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)), w=rand(5)),
    reals(3, 5),
)
add("group-norm", lambda: nn.GroupNorm(2, 4), reals(4, 3, 2))
add("group-norm-2d", lambda: nn.GroupNorm(2, 4), reals(4))
add(
    "group-norm-of-frames",
    lambda: Raw(lambda m, x: m.f(x.flatten(0, 1)).unflatten(0, (-1, 3)), f=nn.GroupNorm(2, 4)),
    reals(3, 4, 5),
)
for rank, norm in ((1, nn.InstanceNorm1d), (2, nn.InstanceNorm2d), (3, nn.InstanceNorm3d)):
    add(f"instance-norm-{rank}d", lambda norm=norm: norm(4, affine=True), reals(4, *(5, 3, 2)[:rank]))


class FrozenBatchNorm(nn.Sequential):
    """Batch normalisation by its running statistics; its affine parameters are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(2, channels, 2), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self[1].running_mean = torch.randn(channels)
        self[1].running_var = torch.rand(channels) + 0.5

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self[1].eval()
        return self


add("frozen-batch-norm", lambda: FrozenBatchNorm(3), reals(2, 4, 4))
add("prelu", lambda: nn.PReLU(), reals(3, 5))
add("prelu-channels", lambda: nn.PReLU(3), reals(3, 5))

# --- attention ------------------------------------------------------------------------------------------------------


def attention_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of self-attention."""
    x = batch["x"] if model.batch_first else batch["x"].transpose(0, 1)
    out, weights = model(x, x, x)
    out = out if model.batch_first else out.transpose(0, 1)
    return out.cos().mean((1, 2)).mean() + weights.square().mean((1, 2)).mean()


def attention(causal: bool = False, padded: bool = False, **inputs: int) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the mean loss of cross-attention with masks."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        options: dict[str, Any] = {"need_weights": False}
        if causal:
            options["attn_mask"] = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
        if padded:
            options["key_padding_mask"] = batch["pad"]
        return (
            model(batch["x"], batch.get("k", batch["x"]), batch.get("v", batch["x"]), **options)[0]
            .cos()
            .mean((1, 2))
            .mean()
        )

    return loss


def padded_sequences() -> Batch:
    """Return sequences of length 3, some padded."""
    lengths = torch.tensor([3, 2, 1, 2])
    return {"x": torch.randn(B, 3, 6), "pad": torch.arange(3) >= lengths[:, None]}


for first in (True, False):
    add(
        f"attention-batch-first={first}",
        lambda first=first: nn.MultiheadAttention(6, 2, batch_first=first),
        reals(3, 6),
        attention_loss,
    )
    add(
        f"attention-bias-kv-batch-first={first}",
        lambda first=first: nn.MultiheadAttention(6, 2, batch_first=first, add_bias_kv=True),
        reals(3, 6),
        attention_loss,
    )
add("attention-batch-size-length", lambda: nn.MultiheadAttention(6, 2), reals(B, 6), attention_loss)
add("attention-causal", lambda: nn.MultiheadAttention(6, 2, batch_first=True), reals(3, 6), attention(causal=True))
add("attention-padded", lambda: nn.MultiheadAttention(6, 2, batch_first=True), padded_sequences, attention(padded=True))
add("attention-no-bias", lambda: nn.MultiheadAttention(6, 2, bias=False, batch_first=True), reals(3, 6), attention())
add(
    "attention-kdim-vdim",
    lambda: nn.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True),
    lambda: {"x": rand(B, 3, 6), "k": rand(B, 2, 5), "v": rand(B, 2, 4)},
    attention(),
)
SMALL = {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
for norm_first in (True, False):
    add(
        f"transformer-encoder-norm-first={norm_first}",
        lambda norm_first=norm_first: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**SMALL, norm_first=norm_first), 2, enable_nested_tensor=False
        ),
        reals(3, 6),
    )
add(
    "transformer-encoder-time-major",
    lambda: nn.TransformerEncoderLayer(**{**SMALL, "batch_first": False}),
    reals(3, 6),
    time_major_loss,
)
add(
    "transformer-encoder-padded",
    lambda: nn.TransformerEncoderLayer(**SMALL),
    padded_sequences,
    lambda m, b: m(b["x"], src_key_padding_mask=b["pad"]).cos().mean((1, 2)).mean(),
)
add(
    "transformer-decoder",
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SMALL, activation="gelu"), 2),
    lambda: {"x": rand(B, 3, 6), "memory": rand(B, 2, 6)},
    lambda m, b: (
        m(b["x"], b["memory"], tgt_mask=nn.Transformer.generate_square_subsequent_mask(3, dtype=b["x"].dtype))
        .cos()
        .mean((1, 2))
        .mean()
    ),
)
add(
    "window-partition",
    lambda: Raw(
        lambda m, x: m.f(x.reshape(-1, 2, 2, 2, 2, 3).transpose(2, 3).reshape(-1, 4, 3)).reshape(-1, 4, 4, 5) + m.b(x),
        f=nn.Linear(3, 5),
        b=nn.Linear(3, 5),
    ),
    reals(4, 4, 3),
)
raw(
    "time-major-flattened",
    lambda m, x: m.g(m.f(x.transpose(0, 1).reshape(-1, 5)).relu()).unflatten(0, (3, -1)).transpose(0, 1),
    reals(3, 5),
    f=lambda: nn.Linear(5, 6),
    g=lambda: nn.LayerNorm(6),
)

# --- recurrent ------------------------------------------------------------------------------------------------------


def recurrent_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a recurrent network, its last state included."""
    out, state = model(batch["x"] if model.batch_first else batch["x"].transpose(0, 1))
    out = out if model.batch_first else out.transpose(0, 1)
    last = state[0] if isinstance(state, tuple) else state
    return out.cos().mean((1, 2)).mean() + last.transpose(0, 1).flatten(1).square().mean(1).mean()


for kind in (nn.LSTM, nn.GRU, nn.RNN):
    for option in ({}, {"num_layers": 2, "batch_first": True}, {"bidirectional": True, "bias": False}):
        label = ",".join(f"{k}={v}" for k, v in option.items())
        add(
            f"{kind.__name__}-{label}",
            lambda kind=kind, option=option: kind(4, 3, **option),
            reals(5, 4),
            recurrent_loss,
        )
add("LSTM-projected", lambda: nn.LSTM(4, 3, proj_size=2, batch_first=True), reals(5, 4), recurrent_loss)
add("LSTM-dropout-zero", lambda: nn.LSTM(4, 3, 2, dropout=0.0), reals(5, 4), recurrent_loss)
for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    add(f"{cell.__name__}", lambda cell=cell: Raw(lambda m, x: unrolled(m, x), f=cell(4, 3)), reals(5, 4))
add(
    "LSTM-trained-state",
    lambda: Raw(
        lambda m, x: m.f(x, (m.h.repeat(1, len(x), 1), m.c.expand(-1, len(x), -1).contiguous()))[0],
        f=nn.LSTM(4, 3, batch_first=True),
        h=rand(1, 1, 3),
        c=rand(1, 1, 3),
    ),
    reals(5, 4),
)


def unrolled(model: nn.Module, x: Tensor) -> Tensor:
    """Run a recurrent cell along a sequence."""
    state = None
    for t in range(x.shape[1]):
        state = model.f(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


# --- parametrisations -----------------------------------------------------------------------------------------------
for name, parametrize in (
    ("weight-norm", parametrizations.weight_norm),
    ("spectral-norm", parametrizations.spectral_norm),
    ("orthogonal", parametrizations.orthogonal),
):
    add(
        f"{name}-linear",
        lambda parametrize=parametrize: nn.Sequential(parametrize(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 3)),
        reals(5),
    )
    add(f"{name}-sequence", lambda parametrize=parametrize: parametrize(nn.Linear(5, 6)), reals(7, 5))
add("weight-norm-conv", lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 2)), reals(3, 4, 4))
add("spectral-norm-conv", lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 2)), reals(3, 4, 4))


class Evaluating(nn.Sequential):
    """A model that stays in evaluation mode."""

    def train(self, mode: bool = True) -> Evaluating:
        return super().train(False)


add("spectral-norm-eval", lambda: Evaluating(parametrizations.spectral_norm(nn.Linear(5, 6))), reals(5))
raw("merged-adapter", lambda m, x: F.linear(x, m.w + m.b @ m.a), reals(5), w=p(4, 5), a=p(2, 5), b=p(4, 2))
raw(
    "merged-adapter-frozen",
    lambda m, x: F.linear(x, m.w + 0.5 * (m.b @ m.a)),
    reals(7, 5),
    w=p(4, 5),
    a=p(2, 5),
    b=p(4, 2),
    trained=lambda n: n != "w",
)
raw(
    "frozen-derived",
    lambda m, x: F.linear(x, m.w.exp() * m.g),
    reals(5),
    w=p(4, 5),
    g=p(4, 1),
    trained=lambda n: n != "w",
)
raw("drop-connect", lambda m, x: F.linear(x, F.dropout(m.w, 0.5, m.training)), reals(3, 5), w=p(4, 5))

# --- control flow and losses ----------------------------------------------------------------------------------------
raw("unused-parameter", lambda m, x: m.f(x), reals(5), f=linear5, unused=p(3))
raw("used-without-effect", lambda m, x: [m.f(x), m.g(x)][0], reals(5), f=linear5, g=linear5)
raw("branch-of-a-sample", lambda m, x: torch.where(x[:, :1] > 0, m.f(x), m.g(x)), reals(5), f=linear5, g=linear5)
raw("no-grad-branch", lambda m, x: m.f(x) * constant(m, x), reals(5), f=linear5)
raw("detached-branch", lambda m, x: m.f(x) * m.f(x).detach() + m.f.bias.detach(), reals(5), f=linear5)


def constant(model: nn.Module, x: Tensor) -> Tensor:
    """Return a value without a gradient."""
    with torch.no_grad():
        return model.f(x) * model.f.weight.sum()


add(
    "several-losses",
    lambda: nn.Linear(5, 4),
    reals(5),
    lambda m, b: mean_loss(m, b) + 0.3 * m(b["x"] * 2).square().mean(1).mean(),
)
add("weight-decay", lambda: nn.Linear(5, 4), reals(5), lambda m, b: mean_loss(m, b) + 0.01 * m.weight.square().sum())
add(
    "weight-decay-first",
    lambda: nn.Linear(5, 4),
    reals(5),
    lambda m, b: m.weight.norm() + m.bias.abs().sum() + mean_loss(m, b),
)
add(
    "weight-decay-in-place",
    lambda: nn.Linear(5, 4),
    reals(5),
    lambda m, b: mean_loss(m, b).add_(m.weight.square().sum(), alpha=0.1),
)
add(
    "weight-decay-subtracted",
    lambda: nn.Linear(5, 4),
    reals(5),
    lambda m, b: torch.sub(mean_loss(m, b), m.weight.square().sum(), alpha=0.1),
)
add(
    "weight-decay-per-sample",
    lambda: nn.Linear(5, 4),
    reals(5),
    lambda m, b: (m(b["x"]).cos().mean(1) + m.weight.square().sum()).mean(),
)
add(
    "inner-gradient",
    lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
    reals(5),
    lambda m, b: mean_loss(m, {"x": adversarial(m, b["x"])}),
)


def adversarial(model: nn.Module, x: Tensor) -> Tensor:
    """Return inputs moved along the gradient of the loss, by an inner gradient that trains nothing."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    return (x + 0.1 * gradient.sign()).detach()


for reentrant in (False, True):
    label = f"reentrant={reentrant}"
    raw(
        f"checkpoint-{label}",
        lambda m, x, r=reentrant: m.g(checkpoint(m.f, m.e(x), use_reentrant=r)),
        reals(3, 5),
        e=lambda: nn.Linear(5, 5),
        f=lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 5)),
        g=linear5,
    )
    raw(
        f"checkpoint-reused-{label}",
        lambda m, x, r=reentrant: checkpoint(m.f, checkpoint(m.f, m.f(x).relu(), use_reentrant=r), use_reentrant=r),
        reals(3, 5),
        f=lambda: nn.Linear(5, 5),
    )
    raw(
        f"checkpoint-time-major-{label}",
        lambda m, x, r=reentrant: (
            checkpoint(m.f, m.e(x).transpose(0, 1).flatten(0, 1), use_reentrant=r).unflatten(0, (3, -1)).transpose(0, 1)
        ),
        reals(3, 5),
        e=lambda: nn.Linear(5, 5),
        f=lambda: nn.Linear(5, 5),
    )
    raw(
        f"checkpoint-derived-{label}",
        lambda m, x, r=reentrant: checkpoint(lambda h: F.linear(h, m.w.t() * 2) + m.w.sum(), m.e(x), use_reentrant=r),
        reals(3, 5),
        e=lambda: nn.Linear(5, 5),
        w=p(5, 4),
    )

# --- precision ------------------------------------------------------------------------------------------------------
for autocast in (False, True):
    kind = "autocast" if autocast else "float32"
    options: dict[str, Any] = {"dtype": torch.float32, "autocast": autocast}
    add(
        f"{kind}-mlp",
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 3)),
        reals(3, 5),
        **options,
    )
    add(
        f"{kind}-cnn",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.ReLU(True), nn.Conv2d(4, 2, 2, groups=2)
        ),
        reals(3, 5, 5),
        **options,
    )
    add(f"{kind}-tied", Tied, ids(6), next_token_loss, **options)
    add(f"{kind}-transformer", lambda: nn.TransformerEncoderLayer(**SMALL), reals(3, 6), **options)
    raw(
        f"{kind}-merged-adapter",
        lambda m, x: F.linear(x, m.w + m.b @ m.a) * m.s,
        reals(3, 5),
        w=p(4, 5),
        a=p(2, 5),
        b=p(4, 2),
        s=p(),
        **options,
    )
    raw(f"{kind}-generic", lambda m, x: (m.w @ x.mT) * m.s, reals(3, 5), w=p(4, 5), s=p(4, 1), **options)
add("float32-lstm", lambda: nn.LSTM(4, 3), reals(5, 4), recurrent_loss, dtype=torch.float32)

# --- several of the above at once -----------------------------------------------------------------------------------
raw(
    "two-views-of-a-sample",
    lambda m, x: split_views(m.g(m.f(torch.cat([x, x.sin()])).tanh())),
    reals(5),
    f=linear5,
    g=lambda: nn.LayerNorm(4),
)
raw(
    "positions-flattened",
    lambda m, x: (x.flatten(0, 1) + m.e(torch.arange(3).repeat(len(x)))).unflatten(0, (-1, 3)),
    reals(3, 5),
    e=lambda: nn.Embedding(3, 5),
)
raw(
    "positions-flattened-row-first",
    lambda m, x: (
        (x.transpose(0, 1).flatten(0, 1) + m.e(torch.arange(3).repeat_interleave(len(x))))
        .unflatten(0, (3, -1))
        .transpose(0, 1)
    ),
    reals(3, 5),
    e=lambda: nn.Embedding(3, 5),
)
raw(
    "position-bias-repeated-for-heads",
    lambda m, x: (torch.bmm(h := x.flatten(0, 1), h.mT) + m.t.repeat(len(x), 1, 1)).unflatten(0, (-1, 2)),
    reals(2, 3, 5),
    t=p(2, 3, 3),
)
raw("kronecker-row-first", lambda m, x: torch.kron(m.w, x).unflatten(0, (2, -1)).transpose(0, 1), reals(5), w=p(2, 2))
raw(
    "functional-call",
    lambda m, x: torch.func.functional_call(m.f, {"weight": m.f.weight * 2, "bias": m.b}, x),
    reals(5),
    f=linear5,
    b=p(4),
)
raw("in-place-chain", lambda m, x: written(m, x), reals(3, 5), f=lambda: nn.Linear(5, 5), w=p(5))
raw("solve", lambda m, x: torch.linalg.solve(torch.eye(5).to(x) + m.w @ m.w.T, x.unsqueeze(-1)), reals(5), w=p(5, 5))
raw("sizes-all-equal", lambda m, x: F.linear(m.w @ x, m.w) + x @ m.w, reals(B, B), w=p(B, B))
raw(
    "autocast-time-major",
    lambda m, x: m.g(m.f(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (3, -1)).transpose(0, 1),
    reals(3, 5),
    f=linear5,
    g=lambda: nn.Linear(4, 3),
    dtype=torch.float32,
    autocast=True,
)


def split_views(z: Tensor) -> Tensor:
    """Return the product of two views of every sample, which follow each other in the batch."""
    return z[: len(z) // 2] * z[len(z) // 2 :]


def written(model: nn.Module, x: Tensor) -> Tensor:
    """Write parameters into views of views of an activation."""
    h = model.f(x).clone()
    view = h[:, 1:]
    view *= model.w
    view[:, 0] += model.w
    h[:, :, 2:4] = model.w[:2]
    return h.cos()
