"""Seeing every operator of an observing pass, for what the functions of the parameters alone do not show.

Owns: which sizes follow from contents, and whether samples were reordered. Does not own: the passes (``observation``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from lightning_dp.bookkeeping.layout import Kind, Layout
from lightning_dp.bookkeeping.operators import OperatorMode
from lightning_dp.bookkeeping.packing import in_recurrent_utilities

ROUNDS = 40
"""How often a model that draws at random is observed at most: layers dropped at random are seen in one of them."""

_MANY = 64
"""Numbers for each sample, all drawn at once, that show in one pass whatever they do: a mask of dropout has zeros and
ones for every sample. A few are one decision, such as to drop a layer or to swap two samples."""

_ROUTED = (
    "it is applied to rows that were chosen by their content (by a mask, or an expert's router), so that samples may "
    "have different numbers of them. Apply it to all rows and mask the result."
)
_PACKED_ROWS = (
    "it is applied to the data of a packed sequence, of which every sample may have another number of rows. Only "
    "nn.LSTM, nn.GRU and nn.RNN may be given packed sequences: apply it before pack_padded_sequence, or after "
    "pad_packed_sequence."
)
_REORDERED = (
    "the training step puts what it computed for the samples in another order, x[order], so it is not known which row "
    "belongs to which sample here. Keep the order of the batch; for packed sequences, leave the sorting to "
    "pack_padded_sequence(..., enforce_sorted=False)."
)

_RAGGED = {"nonzero", "masked_select", "repeat_interleave", "_unique2", "unique_dim", "unique_consecutive"}

_TAKING = {"index_select", "gather", "index_copy", "index_copy_", "index_add", "index_add_", "scatter", "scatter_"}
"""Operators whose second argument is an axis and whose third holds places along it."""


class Witness(OperatorMode):
    """Sees every operator of a pass, whether a parameter enters it or not.

    It collects the sizes of tensors whose shape depends on contents (``x[mask]``, ``nonzero``, ``unique``; the data of
    packed sequences), notes whether activations of the samples are reordered and whether anything is decided at random,
    and seeds every random operator by its number, so that layers dropped at random are the same ones for two and three
    samples.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        super().__init__()
        self.ragged: set[int] = set()
        self.packed: set[int] = set()
        self.reorders_samples = self.decides_at_random = False
        self._num_draws, self._seed, self._num_samples = 0, seed, num_samples

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Seed, run and note an operator."""
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if draws:
            self._num_draws += 1
            torch.manual_seed(ROUNDS * self._num_draws + self._seed)
        result = func(*args, **kwargs)
        self.decides_at_random |= draws and self._is_few(result)
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if by_mask or name in _RAGGED:
            outputs = result if isinstance(result, tuple) else (result,)
            self.ragged |= {size for t in outputs for size in t.shape[:2]}
        if name == "_pack_padded_sequence":
            self.packed.add(result[0].shape[0])
        self.reorders_samples |= _is_order_of(self._num_samples, name, args) and not in_recurrent_utilities()
        return result

    def _is_few(self, drawn: Any) -> bool:
        sizes = [t.numel() for t in tree_leaves(drawn) if isinstance(t, Tensor)]
        return max(sizes, default=0) < _MANY * self._num_samples


def _is_order_of(num_samples: int, name: str, args: Any) -> bool:
    """Whether an operator takes as many rows as there are samples, in some order, along an axis of that size.

    Only of what has a gradient: a batch that is reordered as a whole before is one in another order, and nothing else.
    """
    if name in ("index", "index_put", "index_put_"):
        places = [(k, index) for k, index in enumerate(args[1]) if index is not None]
        if len(places) != 1 or places[0][1].dtype is not torch.int64:
            return False  # x[arange(B), last] takes something of every sample; x[mask] is ragged
        dim, size = places[0][0], places[0][1].numel()
    elif name in _TAKING and isinstance(args[2], Tensor) and args[2].dim():
        dim, size = args[1], args[2].shape[args[1] if args[2].dim() > 1 else 0]
    else:
        return False
    has_gradient = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    return has_gradient and size == num_samples and args[0].dim() > 0 and args[0].shape[dim] == num_samples


def routing(layout: Layout, two: Witness, three: Witness) -> str:
    """Return why rows of different numbers for different samples may enter a function, ``""`` if they do not."""
    if layout.kind is Kind.PER_SAMPLE and two.reorders_samples and three.reorders_samples:
        return _REORDERED
    axes = [axis for axis in (*layout.leaves, *layout.outputs) if axis is not None and axis.rows > 1]
    if any(2 * axis.rows in two.ragged and 3 * axis.rows in three.ragged for axis in axes):
        return _ROUTED
    # Packed data begins with the first steps of all samples; padded rows of the same number, sample by sample, do not.
    outermost = [axis for axis in axes if axis.rows_outermost]
    packed = any(2 * axis.rows in two.packed and 3 * axis.rows in three.packed for axis in outermost)
    return _PACKED_ROWS if packed else ""
