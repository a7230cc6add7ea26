"""Seeing every operator of an observing pass, for what the functions of the parameters alone do not show.

Owns: which sizes follow from contents, and whether samples were reordered. Does not own: the passes (``observation``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from lightning_dp.bookkeeping.layout import Layout
from lightning_dp.bookkeeping.operators import OperatorMode
from lightning_dp.bookkeeping.packing import in_recurrent_utilities

ROUNDS = 40
"""How often a model that draws at random is observed at most: layers dropped at random are seen in one of them."""

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
    "the training step (or the collate_fn) puts the samples of the batch in another order, so it is not known which "
    "packed sequence belongs to which sample. Leave the sorting to pack_padded_sequence(..., enforce_sorted=False)."
)


_RAGGED = {"nonzero", "masked_select", "repeat_interleave", "_unique2", "unique_dim", "unique_consecutive"}


class Witness(OperatorMode):
    """Sees every operator of a pass, whether a parameter enters it or not.

    It collects the sizes of tensors whose shape depends on contents (``x[mask]``, ``nonzero``, ``unique``; the data of
    packed sequences), notes whether samples are put in another order, and seeds every random operator by its number, so
    that layers dropped at random are the same ones for two and three samples.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        super().__init__()
        self.ragged: set[int] = set()
        self.packed: set[int] = set()
        self.reorders_samples = False
        self.num_draws, self._seed, self._num_samples = 0, seed, num_samples

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Seed, run and note an operator."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.num_draws += 1
            torch.manual_seed(ROUNDS * self.num_draws + self._seed)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if by_mask or name in _RAGGED:
            outputs = result if isinstance(result, tuple) else (result,)
            self.ragged |= {size for t in outputs for size in t.shape[:2]}
        if name == "_pack_padded_sequence":
            self.packed.add(result[0].shape[0])
        self.reorders_samples |= _is_order_of(self._num_samples, name, args) and not in_recurrent_utilities()
        return result


def _is_order_of(num_samples: int, name: str, args: Any) -> bool:
    """Whether an operator takes as many rows as there are samples, in some order, along an axis of that size."""
    if name == "index":
        places = [(k, index) for k, index in enumerate(args[1]) if index is not None]
        dim, index = places[0]
        alone = len(places) == 1 and index.dtype is torch.int64
        chosen = index.numel() if alone else 0  # x[arange(B), last] takes something of every sample
    elif name in ("index_select", "gather"):
        dim, index = args[1], args[2]
        chosen = index.shape[dim if name == "gather" else 0] if index.dim() else 0
    else:
        return False
    return chosen == num_samples and args[0].dim() > 0 and args[0].shape[dim] == num_samples


def routing(layout: Layout, two: Witness, three: Witness) -> str:
    """Return why rows of different numbers for different samples may enter a function, ``""`` if they do not."""
    if layout.packed:
        return _REORDERED if two.reorders_samples and three.reorders_samples else ""
    axes = [axis for axis in (*layout.leaves, *layout.outputs) if axis is not None and axis.rows > 1]
    if any(2 * axis.rows in two.ragged and 3 * axis.rows in three.ragged for axis in axes):
        return _ROUTED
    # Packed data begins with the first steps of all samples; padded rows of the same number, sample by sample, do not.
    outermost = [axis for axis in axes if axis.rows_outermost]
    packed = any(2 * axis.rows in two.packed and 3 * axis.rows in three.packed for axis in outermost)
    return _PACKED_ROWS if packed else ""
