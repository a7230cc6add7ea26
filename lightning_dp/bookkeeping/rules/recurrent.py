"""LSTM, GRU and RNN: layers in both directions, projected, of padded or packed sequences; and single cells.

Owns: what is read from a call, and which calls are refused. Does not own: the pass through the layers (``layers``).

The function itself runs fused, as always. In the backward pass its layers run once more, one after the other and
without a graph, for the states between them; then the gradients of the gates go down through the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.bookkeeping.call import identity
from lightning_dp.bookkeeping.layout import key_of
from lightning_dp.bookkeeping.operation import Operation, Recording
from lightning_dp.bookkeeping.packing import Packing, packing_of
from lightning_dp.bookkeeping.precision import accurate
from lightning_dp.bookkeeping.random_state import replaying
from lightning_dp.bookkeeping.refusals import refusal
from lightning_dp.bookkeeping.rules.generic import Replay
from lightning_dp.bookkeeping.rules.layers import CELLS, Network, Parts, file_direction, stacked
from lightning_dp.bookkeeping.rules.recurrence import Steps
from lightning_dp.bookkeeping.rules.sequences import Packed, Padded, Sequences

_OTHERWISE = (
    "packed sequences are given to it otherwise than nn.LSTM, nn.GRU and nn.RNN do, or in place of the padded ones "
    "that it was observed with. Use these layers, and either pack in every step or never."
)
_NOT_REPLAYED = (
    "the random numbers of its dropout between layers cannot be drawn once more (cuDNN keeps its own). Use dropout=0 "
    "and nn.Dropout between single layers, or torch.backends.cudnn.enabled = False."
)


def recurrent(operation: Operation, *args: Any, **kwargs: Any) -> Recording | None:
    """``lstm(input, hx, weights, ...)`` and its relatives, or with packed ``data, batch_sizes`` for the input."""
    packing = packing_of(operation.func.__name__, operation.leaves)
    if (packing is not None) != operation.layout.packed or (packing is not None and kwargs):
        return _refused(operation, _OTHERWISE)
    if kwargs:
        return None
    input, hx, weights, has_biases, num_layers, dropout, train, bidirectional, *rest = (
        args if packing is None else (args[0], *args[2:])
    )
    states, batch_first = [hx] if isinstance(hx, Tensor) else list(hx), bool(rest and rest[0])
    if packing is not None and (problem := packing.problem(operation.book.num_samples)):
        return _refused(operation, problem)
    axis = _axis(operation, input, states, batch_first) if packing is None else SampleAxis(1, 1)
    if axis is None or any(operation.filing(t) is not None for t in (input, *states)):
        return None if packing is None else _refused(operation, _OTHERWISE)
    network = Network(
        func=operation.func,
        weights=[accurate(operation.plain(w)) for w in weights],
        files=[operation.filing(w) for w in weights],
        has_biases=has_biases,
        num_layers=num_layers,
        num_directions=2 if bidirectional else 1,
        dropout=dropout if train and num_layers > 1 else 0.0,
    )
    num_samples = operation.book.num_samples
    if packing is None:
        return _recording(operation, network, [input, *states], [], lambda: Padded(batch_first, axis, num_samples))
    order = [packing.batch_sizes] if packing.rank is None else [packing.batch_sizes, packing.rank]
    return _recording(operation, network, [input, *states], order, lambda *of: Packed(Packing(*of), input.device))


def cell(
    operation: Operation,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Recording | None:
    """``lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)`` and its relatives: a layer of one step."""
    states, count = [hx] if isinstance(hx, Tensor) else list(hx), len(operation.layout.outputs)
    axis, num_samples = operation.axis(input), operation.book.num_samples
    alike = all(other == axis for other in (*map(operation.axis, states), *operation.layout.outputs))
    if axis is None or axis.dim != 0 or not alike or any(operation.filing(t) is not None for t in (input, *states)):
        return None
    equations = CELLS[operation.func.__name__.removesuffix("_cell")]
    given = w_ih, w_hh, b_ih, b_hh
    weights = stacked([Parts(*(None if w is None else accurate(operation.plain(w)) for w in given))])
    files, rows = Parts(*map(operation.filing, given)), Padded(False, replace(axis, dim=1), num_samples)

    def record(*tensors: Tensor) -> None:
        (g, *g_c), (x, h, *c) = ([accurate(t)[None, None] for t in part] for part in (tensors[:count], tensors[count:]))
        steps = Steps(x, h, g, c[0][0] if c else None, g_c[0] if g_c else None)
        file_direction(files, steps, equations(weights, steps), 0, rows.per_sample)

    return record, [input, *states]


def _recording(
    operation: Operation,
    network: Network,
    tensors: list[Tensor],
    order: list[Tensor],
    sequences_of: Callable[..., Sequences],
) -> Recording:
    """Record a network.

    Args:
        operation: The call.
        network: Its layers.
        tensors: Inputs and initial states.
        order: What tells the order of packed sequences.
        sequences_of: Makes the sequences of that.
    """
    count, state = len(operation.layout.outputs), operation.random_state
    replay, not_replayed = Replay(operation) if network.dropout else None, _refused(operation, _NOT_REPLAYED)
    if replay is not None and state is None:
        return not_replayed

    def record(*given: Tensor) -> None:
        gradients, given = given[:count], given[count:]
        (input, *states), given = given[: len(tensors)], given[len(tensors) :]
        sequences = sequences_of(*given[: len(order)])
        with replaying(state):
            runs = network.run(sequences, accurate(sequences.native(input)), list(map(accurate, states)))
        if replay is not None:
            its = replay(tuple(replay.trained), given[len(order) :])[0]
            if not _close(runs[-1].out, sequences.native(its)):
                not_replayed[0]()
        network.file(sequences, runs, states, gradients)

    return record, [*tensors, *order, *(replay.saved if replay is not None else [])]


def _axis(operation: Operation, input: Tensor, states: Sequence[Tensor], batch_first: bool) -> SampleAxis | None:
    """Return the sample axis of time-major sequences, ``None`` if not everything carries its samples there."""
    axis = operation.axis(input)
    if axis is None or axis.dim != (0 if batch_first else 1) or operation.layout.outputs[0] != axis:
        return None
    time_major = replace(axis, dim=1)
    others = [*map(operation.axis, states), *operation.layout.outputs[1:]]
    return time_major if all(other == time_major for other in others) else None


def _refused(operation: Operation, reason: str) -> Recording:
    found = [target for target in operation.targets if target is not None]
    key = key_of(operation.func.__name__, map(identity, found))
    return refusal(key, replace(operation.layout, reason=reason)), []


def _close(mine: Tensor, its: Tensor) -> bool:
    """Whether layers that ran one by one are the function that ran; with other random numbers they are far apart."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(its.dtype, 5e-2)
    return torch.allclose(mine, accurate(its).to(mine), rtol=tolerance, atol=tolerance, equal_nan=True)
