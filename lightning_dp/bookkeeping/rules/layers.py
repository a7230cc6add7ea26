"""The layers of an LSTM, GRU or RNN, one after the other, and the entries of their weights.

Owns: the pass through the layers and back. Does not own: the equations of a layer (``recurrence``), the order of the
sequences (``sequences``) or the call that was recorded (``recurrent``).

Shapes: L layers, D directions, T steps, N sequences, k features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.bookkeeping.entries import SUMMED, Dense
from lightning_dp.bookkeeping.operation import File
from lightning_dp.bookkeeping.precision import accurate
from lightning_dp.bookkeeping.products import Outer
from lightning_dp.bookkeeping.rules import recurrence
from lightning_dp.bookkeeping.rules.recurrence import Cell, GateGradients, Steps, Weights, product
from lightning_dp.bookkeeping.rules.sequences import Sequences

CELLS: dict[str, Cell] = {
    "lstm": recurrence.lstm,
    "gru": recurrence.gru,
    "rnn_tanh": recurrence.rnn_tanh,
    "rnn_relu": recurrence.rnn_relu,
}


class Run(NamedTuple):
    """Native inputs and outputs of one layer, and what multiplied the outputs on the way to the next."""

    x: Tensor
    out: Tensor
    kept: Tensor | None


class Parts(NamedTuple):
    """What belongs to the weights of one layer in one direction; the last three may be missing."""

    ih: Any
    hh: Any
    b_ih: Any = None
    b_hh: Any = None
    hr: Any = None


@dataclass(frozen=True)
class Network:
    """All layers of one recurrent function, without anything of the batch.

    Args:
        func: The function.
        weights: The detached weights of every layer and direction, as the function takes them.
        files: Where their entries go, in the same order.
        has_biases: Whether there are biases.
        num_layers: L.
        num_directions: D.
        dropout: The share of a layer's outputs that is dropped before the next.
    """

    func: Callable[..., Any]
    weights: list[Tensor]
    files: list[File | None]
    has_biases: bool
    num_layers: int
    num_directions: int
    dropout: float = 0.0

    def run(self, sequences: Sequences, native: Tensor, states: Sequence[Tensor]) -> list[Run]:
        """Run layer by layer, from initial states ``[L D, N, k]``."""
        runs: list[Run] = []
        for layer in range(self.num_layers):
            own = self._states(states, layer)
            hx = tuple(own) if len(own) > 1 else own[0]
            options = self.has_biases, 1, 0.0, False, self.num_directions == 2
            out = sequences.call(self.func, native, hx, self._of_layer(self.weights, layer), *options)[0]
            drops = self.dropout > 0 and layer < self.num_layers - 1
            kept = F.dropout(torch.ones_like(out), self.dropout) if drops else None
            runs.append(Run(native, out, kept))
            native = out if kept is None else out * kept
        return runs

    def file(
        self, sequences: Sequences, runs: Sequence[Run], states: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """File the entries of all layers, from the last down to the first whose weights are trained.

        Args:
            sequences: The form of the sequences.
            runs: What went through the layers.
            states: Initial states.
            gradients: Gradients of the outputs and of the last states.
        """
        first, last = ([sequences.states(accurate(s)) for s in group] for group in (states, gradients[1:]))
        g = sequences.steps(sequences.native(accurate(gradients[0])))
        lowest = next(k for k in range(self.num_layers) if any(self._of_layer(self.files, k)))
        for layer in range(self.num_layers - 1, lowest - 1, -1):
            weights = self._stacked(layer)
            steps = _steps(sequences, runs[layer], g, self._states(first, layer), self._states(last, layer))
            found = CELLS[self.func.__name__](weights, steps)
            for d, files in enumerate(self._parts(self.files, layer)):
                file_direction(files, steps, found, d, sequences.per_sample)
            if layer > lowest:
                below, kept = product(found.ih, weights.ih).unbind(0), runs[layer - 1].kept
                g = torch.stack([_directed(sequences, t, d) for d, t in enumerate(below)]).sum(0)
                g = g if kept is None else g * sequences.steps(kept)

    def _of_layer(self, of: Sequence[Any], layer: int) -> list[Any]:
        """Return the part of a list of all weights (or of their files) that belongs to a layer."""
        each = len(of) // self.num_layers
        return list(of[layer * each : (layer + 1) * each])

    def _parts(self, of: Sequence[Any], layer: int) -> list[Parts]:
        """Return the same by direction and name."""
        flat, first = self._of_layer(of, layer), 4 if self.has_biases else 2
        each = len(flat) // self.num_directions
        directions = [flat[d * each : (d + 1) * each] for d in range(self.num_directions)]
        return [Parts(*p[:2], *(p[2:4] if self.has_biases else (None, None)), *p[first:]) for p in directions]

    def _stacked(self, layer: int) -> Weights:
        return stacked(self._parts(self.weights, layer))

    def _states(self, of: Sequence[Tensor], layer: int) -> list[Tensor]:
        """Return the states of a layer, ``[D, N, k]`` each, from those of all layers."""
        return [s[layer * self.num_directions : (layer + 1) * self.num_directions] for s in of]


def stacked(directions: Sequence[Parts]) -> Weights:
    """Return the weights of all directions of a layer together."""
    ih, hh, b_ih, b_hh, hr = (
        None if column[0] is None else torch.stack(column) for column in zip(*directions, strict=True)
    )
    assert ih is not None, "an input has a weight"
    assert hh is not None, "and so has a state"
    return Weights(ih, hh, b_ih, b_hh, hr)


def file_direction(
    files: Parts, steps: Steps, found: GateGradients, d: int, per_sample: Callable[[Tensor], Tensor]
) -> None:
    """File the entries of one layer in one direction.

    Args:
        files: Where the entries go.
        steps: What went through the layer.
        found: The gradients of its gates.
        d: The direction.
        per_sample: Returns the steps of every sample, ``[B, steps, k]``, from ``[T, N, k]``.
    """
    if files.ih is not None:
        files.ih(Outer(per_sample(steps.x[d]), per_sample(found.ih[d])))
    if files.hh is not None:
        files.hh(Outer(per_sample(steps.h[d]), per_sample(found.hh[d])))
    if files.b_ih is not None:
        files.b_ih(Dense(per_sample(found.ih[d]).sum(1), SUMMED))
    if files.b_hh is not None:
        files.b_hh(Dense(per_sample(found.hh[d]).sum(1), SUMMED))
    if files.hr is not None and found.unprojected is not None and found.projected is not None:
        files.hr(Outer(per_sample(found.unprojected[d]), per_sample(found.projected[d])))


def _steps(sequences: Sequences, run: Run, g: Tensor, first: Sequence[Tensor], ends: Sequence[Tensor]) -> Steps:
    """Return the steps of a layer, those of every direction in its own order."""
    num_directions = len(first[0])

    def directed(t: Tensor) -> list[Tensor]:
        return [_directed(sequences, part, d) for d, part in enumerate(t.chunk(num_directions, -1))]

    def with_ends(parts: list[Tensor], at: Tensor) -> Tensor:
        return torch.stack([sequences.add_at_ends(part, end) for part, end in zip(parts, at, strict=True)])

    x, out = sequences.steps(run.x), directed(sequences.steps(run.out))
    memory = first[1] if len(first) > 1 else None
    nothing = [] if memory is None else [g.new_zeros(len(g), *part.shape) for part in memory]
    return Steps(
        x=torch.stack([_directed(sequences, x, d) for d in range(num_directions)]),
        h=torch.stack([torch.cat([h[None], part[:-1]]) for h, part in zip(first[0], out, strict=True)]),
        g=with_ends(directed(g), ends[0]),
        c=memory,
        g_c=None if memory is None else with_ends(nothing, ends[1]),
    )


def _directed(sequences: Sequences, steps: Tensor, direction: int) -> Tensor:
    """Return steps in the order of a direction, or back; the second direction begins with the last step."""
    return sequences.reversed(steps) if direction else steps
