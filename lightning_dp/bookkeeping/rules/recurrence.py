"""Gradients of the gates of one recurrent layer, backward in time.

Owns: the equations of the cells. Does not own: layers, layouts of sequences or entries (``recurrent``).

All states of a layer are known from its forward pass, so the gates of all steps are two matrix products; what goes
backward in time is one matrix product for each step. For the gradient ``G_t`` of the gates before their activation,
``W_ih`` has the gradient ``sum_t G_t x_t^T`` and ``W_hh`` has ``sum_t G_t h_{t-1}^T``; in a GRU the candidate's part
of the second is that of the first times the reset gate.

Shapes: D directions, T steps, N sequences, d inputs, H hidden units, k gates, P outputs (H, unless projected). The
steps of a direction are in its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of one layer.

    Args:
        ih: ``[D, k H, d]``.
        hh: ``[D, k H, P]``.
        b_ih: ``[D, k H]`` or ``None``.
        b_hh: ``[D, k H]`` or ``None``.
        hr: The projection, ``[D, P, H]``, or ``None``.
    """

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    hr: Tensor | None = None


@dataclass(frozen=True)
class Steps:
    """What went into the steps of one layer, and the gradients that came back.

    Args:
        x: The inputs, ``[D, T, N, d]``.
        h: The state before every step, ``[D, T, N, P]``.
        c: The memory of an LSTM before the first step, ``[D, N, H]``.
        g: The gradient of every output, ``[D, T, N, P]``.
        g_c: The gradient of an LSTM's memory after every step from elsewhere than the next, ``[D, T, N, H]``.
    """

    x: Tensor
    h: Tensor
    g: Tensor
    c: Tensor | None = None
    g_c: Tensor | None = None


@dataclass(frozen=True)
class GateGradients:
    """Gradients of the gates before their activation.

    Args:
        ih: As the input enters them, ``[D, T, N, k H]``.
        hh: As the state enters them, ``[D, T, N, k H]``.
        unprojected: The outputs before the projection, ``[D, T, N, H]``.
        projected: The gradient of the outputs after it, ``[D, T, N, P]``.
    """

    ih: Tensor
    hh: Tensor
    unprojected: Tensor | None = None
    projected: Tensor | None = None


Cell = Callable[[Weights, Steps], GateGradients]


def lstm(weights: Weights, steps: Steps) -> GateGradients:
    """``c' = f c + i u``, ``h' = o tanh(c')`` (times the projection), gates in the order i, f, u, o."""
    assert steps.c is not None, "an LSTM has a memory"
    assert steps.g_c is not None, "and a gradient of it"
    gates = _from_input(weights, steps) + _from_state(weights, steps)
    i, f, u, o = gates.chunk(4, -1)
    i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
    memory = _memories(steps.c, f, i * u)
    tanh = memory[:, 1:].tanh()
    of_memory = torch.stack([u * i * (1 - i), memory[:, :-1] * f * (1 - f), i * (1 - u * u)], -2).unbind(1)
    of_output, through = (tanh * o * (1 - o)).unbind(1), (o * (1 - tanh * tanh)).unbind(1)
    forget, g, g_c = f.unbind(1), steps.g.unbind(1), steps.g_c.unbind(1)
    result, projected = torch.empty_like(gates), torch.empty_like(steps.g)
    last = len(g) - 1
    dh, dc = g[last], g_c[last]
    for t in range(last, -1, -1):
        projected[:, t] = dh
        dm = dh if weights.hr is None else torch.bmm(dh, weights.hr)
        dc = torch.addcmul(dc, dm, through[t])
        here = result[:, t].unflatten(-1, (4, -1))
        torch.mul(of_memory[t], dc.unsqueeze(-2), out=here[..., :3, :])
        torch.mul(of_output[t], dm, out=here[..., 3, :])
        if t:
            dc = torch.addcmul(g_c[t - 1], dc, forget[t])
            dh = torch.baddbmm(g[t - 1], result[:, t], weights.hh)
    return GateGradients(result, result, o * tanh, projected)


def gru(weights: Weights, steps: Steps) -> GateGradients:
    """``h' = (1 - z) u + z h`` with ``u = tanh(W x + r (V h))``, gates in the order r, z, u."""
    x_r, x_z, x_u = _from_input(weights, steps).chunk(3, -1)
    h_r, h_z, h_u = _from_state(weights, steps).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    u = torch.addcmul(x_u, r, h_u).tanh()
    of_u = (1 - z) * (1 - u * u)
    of_r, of_z = of_u * h_u * r * (1 - r), (steps.h - u) * z * (1 - z)
    factors, keep, g = torch.stack([of_r, of_z, of_u * r], -2), z.unbind(1), steps.g.unbind(1)
    dh, through_time = g[-1], torch.empty_like(steps.g)
    hh = torch.empty_like(factors)
    for t, factor in reversed(list(enumerate(factors.unbind(1)))):
        through_time[:, t] = dh
        torch.mul(factor, dh.unsqueeze(-2), out=hh[:, t])
        if t:
            dh = torch.baddbmm(torch.addcmul(g[t - 1], dh, keep[t]), hh[:, t].flatten(-2), weights.hh)
    ih = torch.cat([hh[..., :2, :].flatten(-2), through_time * of_u], -1)
    return GateGradients(ih, hh.flatten(-2))


def rnn_tanh(weights: Weights, steps: Steps) -> GateGradients:
    """``h' = tanh(W x + V h)``."""
    h = (_from_input(weights, steps) + _from_state(weights, steps)).tanh()
    return _plain(weights, steps, 1 - h * h)


def rnn_relu(weights: Weights, steps: Steps) -> GateGradients:
    """``h' = relu(W x + V h)``."""
    h = _from_input(weights, steps) + _from_state(weights, steps)
    return _plain(weights, steps, (h > 0).to(h.dtype))


def _plain(weights: Weights, steps: Steps, slope: Tensor) -> GateGradients:
    g, slopes, result = steps.g.unbind(1), slope.unbind(1), torch.empty_like(slope)
    dh = g[-1]
    for t in range(len(g) - 1, -1, -1):
        torch.mul(slopes[t], dh, out=result[:, t])
        if t:
            dh = torch.baddbmm(g[t - 1], result[:, t], weights.hh)
    return GateGradients(result, result)


def _memories(c: Tensor, forget: Tensor, added: Tensor) -> Tensor:
    """Return the memory before every step and after the last, ``[D, T + 1, N, H]``."""
    memories = [c]
    for f, a in zip(forget.unbind(1), added.unbind(1), strict=True):
        memories.append(torch.addcmul(a, f, memories[-1]))
    return torch.stack(memories, 1)


def _from_input(weights: Weights, steps: Steps) -> Tensor:
    return product(steps.x, weights.ih.mT, weights.b_ih)


def _from_state(weights: Weights, steps: Steps) -> Tensor:
    return product(steps.h, weights.hh.mT, weights.b_hh)


def product(t: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``t @ weight + bias`` for ``[D, T, N, a]``, ``[D, a, b]`` and ``[D, b]``."""
    rows = t.flatten(1, 2)
    result = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return result.unflatten(1, t.shape[1:3])
