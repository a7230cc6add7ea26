"""More models whose book must equal the oracle's: what families of models in the wild were found to need."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bookkeeping.cases import SMALL, add, ids, linear5, p, raw, reals

# --- several rows of every sample, in every order -------------------------------------------------------------------


def encoder() -> nn.Module:
    """Return a transformer layer, whose output projection sees rows (position, sample, frame)."""
    return nn.TransformerEncoderLayer(**SMALL)


def frames(m: Any, x: Tensor) -> Tensor:
    """Encode the frames of every sample, each with a class token in front."""
    flat = x.flatten(0, 1)
    h = m.e(torch.cat([m.t.expand(len(flat), -1, -1), flat], 1))[:, 0]
    return h.unflatten(0, x.shape[:2])


def frames_time_major(m: Any, x: Tensor) -> Tensor:
    """Encode the frames of every sample, all first frames first."""
    return frames(m, x.transpose(0, 1)).transpose(0, 1)


def two_views(m: Any, x: Tensor) -> Tensor:
    """Encode two views of every sample in one batch."""
    first, second = frames(m, torch.cat([x[:, 0], x[:, 1]])[:, None])[:, 0].chunk(2)
    return first * second


raw("class-token-of-frames", frames, reals(3, 2, 6), t=p(1, 1, 6), e=encoder)
raw("class-token-of-frames-time-major", frames_time_major, reals(3, 2, 6), t=p(1, 1, 6), e=encoder)
raw("class-token-of-two-views", two_views, reals(2, 3, 6), t=p(1, 1, 6), e=encoder)
raw(
    "segments-of-choices",
    lambda m, x: m.f(x.flatten(0, 1) + m.e(torch.zeros(x.shape[:3], dtype=torch.long).flatten(0, 1))).unflatten(
        0, x.shape[:2]
    ),
    reals(3, 2, 5),
    e=lambda: nn.Embedding(2, 5),
    f=linear5,
)
raw(
    "codes-flattened",
    lambda m, x: F.one_hot(x.flatten(), 7).to(m.w.dtype).matmul(m.w).unflatten(0, x.shape),
    ids(6),
    w=p(7, 5),
)
raw(
    "rows-between-positions-and-frames",
    lambda m, x: (m.w @ m.f(x.permute(2, 0, 1, 3).flatten(0, 2)).mT).mT.unflatten(0, (2, -1, 3)).permute(1, 2, 0, 3),
    reals(3, 2, 5),
    f=linear5,
    w=p(3, 4),
)
add(
    "axial-attention",
    lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    reals(3, 4, 6),
    lambda m, b: axial(m, b["x"]).flatten(1).cos().mean(1).mean(),
)


def axial(m: nn.Module, x: Tensor) -> Tensor:
    """Attend along the rows of a picture, then along its columns."""
    for _ in range(2):
        flat = x.flatten(0, 1)
        x = m(flat, flat, flat, need_weights=False)[0].unflatten(0, x.shape[:2]).transpose(1, 2)
    return x


raw(
    "types-time-major",
    lambda m, x: (
        x
        + m.e(torch.zeros(x[..., 0].T.shape, dtype=torch.long).flatten()).unflatten(0, (3, -1)).transpose(0, 1)
        * x.cos()
    ),
    reals(3, 5),
    e=lambda: nn.Embedding(2, 5),
)
raw(
    "token-of-frames-of-which-few-are-used",
    lambda m, x: m.f(m.t.expand(3 * len(x), -1)[: len(x)] * x[:, 0]) + x.mean(1) @ m.t.T,
    reals(3, 5),
    t=p(1, 5),
    f=lambda: nn.Linear(5, 1),
)

# --- parameters written in place ------------------------------------------------------------------------------------


def triangle(m: Any, x: Tensor) -> Tensor:
    """Multiply by a Cholesky factor whose entries are one vector of parameters."""
    factor = torch.zeros(4, 4, dtype=x.dtype)
    rows, columns = torch.tril_indices(4, 4)
    factor[rows, columns] = m.w
    return x @ factor.tril() @ factor.mT


def written_twice(m: Any, x: Tensor) -> Tensor:
    """Write two parameters into one constant, and use it in between."""
    table = x.new_zeros(2, 4)
    table[0] = m.w
    first = x @ table.clone().T
    table[1] = m.w * m.v
    return first + x @ table.T


def scaled_in_place(m: Any, x: Tensor) -> Tensor:
    """Divide a function of parameters in place, as a whole, by a number and by another parameter."""
    w = m.w.t().contiguous()
    w /= 3.0
    w.mul_(m.v.exp()).add_(1)
    return x @ w


raw("cholesky-factor", triangle, reals(3, 4), w=p(10))
raw("table-written-twice", written_twice, reals(4), w=p(4), v=p(4))
raw("derived-scaled-in-place", scaled_in_place, reals(4), w=p(3, 4), v=p(3))
raw(
    "positions-scaled-in-place",
    lambda m, x: (
        x @ m.f(m.e(torch.arange(3))[None]).unflatten(2, (2, -1)).transpose(1, 2).div_(2.0).flatten(1, 2)[0].mT
    ),
    reals(3, 2),
    e=lambda: nn.Embedding(3, 5),
    f=lambda: nn.Linear(5, 4),
)
raw("cast-like-an-activation", lambda m, x: x @ m.w.exp().to(x) + x @ m.w.type_as(x), reals(5), w=p(5, 3))
raw("copy-of-a-parameter", lambda m, x: x @ torch.empty(5, 3, dtype=x.dtype).copy_(m.w), reals(5), w=p(5, 3))
raw(
    "filled-block-by-block",
    lambda m, x: x @ blocks(m, x),
    reals(4),
    w=p(2, 2, 2),
)


def blocks(m: Any, x: Tensor) -> Tensor:
    """Return a block-diagonal matrix."""
    matrix = x.new_zeros(4, 4)
    for k, block in enumerate(m.w):
        matrix[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = block
    return matrix


# --- complex numbers ------------------------------------------------------------------------------------------------


def fourier_layer(m: Any, x: Tensor) -> Tensor:
    """Mix the channels of the lowest frequencies, each by a matrix of its own, beside a convolution."""
    found = torch.fft.rfft(x)
    mixed = found.new_zeros(len(x), 3, found.shape[-1])
    mixed[..., :3] = torch.einsum("bim,iom->bom", found[..., :3], torch.view_as_complex(m.w))
    return torch.fft.irfft(mixed, n=x.shape[-1]) + m.c(x)


def filter_layer(m: Any, x: Tensor) -> Tensor:
    """Multiply the spectrum of a picture by one of parameters."""
    found = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    return torch.fft.irfft2(found * torch.view_as_complex(m.w), s=x.shape[1:3], dim=(1, 2), norm="ortho")


def long_convolution(m: Any, x: Tensor) -> Tensor:
    """Convolve with the response of a diagonal linear system with complex states."""
    length = x.shape[-1]
    poles = torch.complex(-m.a.exp(), m.b)[..., None] * torch.arange(length, dtype=x.dtype)
    kernel = 2 * (torch.complex(m.c, m.d)[..., None] * poles.exp()).sum(1).real
    return torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length), n=2 * length)


def complex_recurrence(m: Any, x: Tensor) -> Tensor:
    """Run a linear recurrence with complex states."""
    state, factor = torch.zeros(len(x), 4, dtype=torch.cdouble), torch.polar((-m.a.exp()).exp(), m.b)
    for t in range(x.shape[1]):
        state = factor * state + (x[:, t] @ m.w).to(torch.cdouble)
    return torch.cat([state.real, state.imag, state.abs()], 1)


raw("fourier-layer", fourier_layer, reals(2, 8), w=p(2, 3, 3, 2), c=lambda: nn.Conv1d(2, 3, 1))
raw("filter-in-the-spectrum", filter_layer, reals(4, 5, 2), w=p(4, 3, 2, 2))
raw("long-convolution", long_convolution, reals(3, 6), a=p(3, 2), b=p(3, 2), c=p(3, 2), d=p(3, 2))
raw("complex-recurrence", complex_recurrence, reals(3, 5), a=p(4), b=p(4), w=p(5, 4))
raw(
    "complex-adjoint",
    lambda m, x: ((x + 1j * x.sin()) @ torch.view_as_complex(m.w).adjoint() @ m.v.to(torch.cdouble).T).abs(),
    reals(5),
    w=p(3, 5, 2),
    v=p(4, 3),
)

# --- look-ups, products and repetitions -----------------------------------------------------------------------------
for vocab in (7, 3):  # more rows than look-ups, and fewer
    raw(f"table-{vocab}-of-vectors", lambda m, x: m.w[x].cos(), ids(5, vocab=vocab), w=p(vocab, 4))
    raw(f"table-{vocab}-of-matrices", lambda m, x: m.w[x, ...].cos(), ids(2, 3, vocab=vocab), w=p(vocab, 4, 2))
    raw(f"table-{vocab}-of-numbers", lambda m, x: m.w[x] + m.w[-1 - x], ids(5, vocab=vocab), w=p(vocab))
    raw(f"table-{vocab}-by-pairs", lambda m, x: m.w[x[:, 1:], x[:, :-1]], ids(5, vocab=vocab), w=p(vocab, vocab))
    raw(f"table-{vocab}-by-a-tuple", lambda m, x: m.w[(x - 1,)].cos(), ids(5, vocab=vocab), w=p(vocab, 4))
    raw(f"table-{vocab}-time-major", lambda m, x: m.w[x.T.flatten()].unflatten(0, (5, -1)).mT.permute(2, 0, 1),
        ids(5, vocab=vocab), w=p(vocab, 4))  # fmt: skip
    raw(
        f"embedding-{vocab}-and-table-and-head",
        lambda m, x: torch.cat([F.embedding(x, m.w), m.w[x], F.embedding(x, m.w) @ m.w.T @ m.w], 1),
        ids(5, vocab=vocab),
        w=p(vocab, 4),
    )
raw("table-by-columns", lambda m, x: m.w[:, x].movedim(0, -1).cos(), ids(5), w=p(4, 7))
raw("table-by-pairs-that-broadcast", lambda m, x: m.w[x[:, :, None], x[:, None]], ids(3), w=p(7, 7))
raw("experts-by-index", lambda m, x: (x[:, :, None] @ m.w[(x[..., 0] > 0).long()])[:, :, 0], reals(5, 4), w=p(2, 4, 3))
raw("product", lambda m, x: torch.mul(x, m.w) * x.cos(), reals(3, 5), w=p(3, 1))
raw("product-of-more-axes", lambda m, x: (x[:, None] * m.w).flatten(1), reals(5), w=p(2, 5))
raw("product-of-fewer-axes", lambda m, x: (x * m.w).unflatten(1, (2, -1)), reals(6), w=p(6))
raw("product-that-widens", lambda m, x: x[..., :1] * m.w, reals(3, 5), w=p(1, 3, 4))
raw("product-on-an-axis-ahead", lambda m, x: (m.w * x.T[:, None]).permute(2, 0, 1), reals(5), w=p(5, 2, 1))
raw("product-of-rows", lambda m, x: (x.flatten(0, 1) * m.w).unflatten(0, (-1, 3)).cos(), reals(3, 5), w=p(5))
raw("product-in-place", lambda m, x: x.clone().mul_(m.w).cos(), reals(3, 5), w=p(5))
raw("product-autocast", lambda m, x: m.f(x) * m.w, reals(5), w=p(4), f=linear5, dtype=torch.float32, autocast=True)
raw("repeat-rows", lambda m, x: x.flatten(0, 1) * m.w.repeat(len(x), 1), reals(3, 5), w=p(3, 5))
raw("repeat-two-axes", lambda m, x: x * m.w.repeat(len(x), 3, 1), reals(3, 5), w=p(1, 1, 5))
raw("repeat-more-often", lambda m, x: x.flatten(0, 1) * m.w.repeat(3 * len(x), 1), reals(3, 5), w=p(1, 5))
raw("repeat-new-axis", lambda m, x: x * m.w.repeat(len(x), 1), reals(5), w=p(5))
raw(
    "used-ten-times",
    lambda m, x: [x := x + 0.1 * m.g(m.f(x).tanh()) * m.s for _ in range(10)][-1],
    reals(2, 5),
    f=linear5,
    g=lambda: nn.Linear(4, 5),
    s=p(5),
)
raw("sparse-activations", lambda m, x: torch.sparse.mm(x.relu().to_sparse(), m.w), reals(5), w=p(5, 3))
