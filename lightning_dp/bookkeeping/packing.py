"""Which row of a packed sequence belongs to which sample.

Owns: the ownership of rows, and what must hold for it to be known. Does not own: per-sample gradients (``rules``).

A packed sequence holds the first steps of all sequences, longest first, then their second steps, and so on: step ``t``
has ``batch_sizes[t]`` rows. Which sample is the longest, only the ``PackedSequence`` knows (``sorted_indices``), and a
recurrent layer's function is not given it. So it is looked up where that function was called from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_UTILITIES = {str(torch.nn.utils.rnn.__file__), str(torch.nn.modules.rnn.__file__)}

RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}

_NOT_FOUND = (
    "its batch_sizes do not come from a PackedSequence that a calling function holds, or from several that do not "
    "agree about their order, so it is not known which rows belong to which sample. Give the PackedSequence of "
    "pack_padded_sequence to nn.LSTM, nn.GRU or nn.RNN, or pad the sequences instead."
)
_OTHER_NUMBER = (
    "the packed sequence holds {} sequences for {} samples: which of them belong to which sample is not known. Pack "
    "one sequence for each sample, or pad the sequences instead of packing them."
)
_SORTED_BY_HAND = (
    "sequences of different lengths were packed with enforce_sorted=True, so they were sorted before, and it is not "
    "known which of them belongs to which sample. Do not sort them, and leave it to "
    "pack_padded_sequence(..., enforce_sorted=False), also in the collate_fn."
)


@dataclass(frozen=True)
class Packing:
    """How the rows of the data of a packed sequence belong to N sequences of at most T steps.

    Args:
        batch_sizes: The number of rows of every step, ``[T]``, descending.
        rank: For every sample, its place in the order by length, ``[N]``; ``None`` for the order of the batch.
        found: Whether ``rank`` is known.
    """

    batch_sizes: Tensor
    rank: Tensor | None = None
    found: bool = True

    @property
    def num_sequences(self) -> int:
        """N."""
        return int(self.batch_sizes[0])

    def problem(self, num_samples: int) -> str:
        """Return why the owners of the rows are not known, with the way out; empty if they are."""
        if not self.found:
            return _NOT_FOUND
        if self.num_sequences != num_samples:
            return _OTHER_NUMBER.format(self.num_sequences, num_samples)
        different = bool((self.batch_sizes != self.batch_sizes[0]).any())
        return _SORTED_BY_HAND if self.rank is None and different else ""

    def places(self) -> Tensor:
        """Return `rank`, the identity included, on the CPU."""
        return torch.arange(self.num_sequences) if self.rank is None else self.rank.cpu()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the row of every step of every sample, and where there is one, both ``[T, N]`` on the CPU."""
        places, start = self.places(), self.batch_sizes.cumsum(0) - self.batch_sizes
        exists = places < self.batch_sizes[:, None]
        return torch.where(exists, start[:, None] + places, 0), exists

    def rows_of(self, sample: int) -> Tensor:
        """Return the rows of one sample, one for each of its steps."""
        rows, exists = self.rows()
        return rows[exists[:, sample], sample]


def packing_of(name: str, leaves: Sequence[Any]) -> Packing | None:
    """Return the packing of the arguments of a recurrent layer's function, ``None`` if they are not packed.

    Args:
        name: The name of the function.
        leaves: The leaves of its arguments: packed data comes with ``batch_sizes`` next.
    """
    if name not in RECURRENT or len(leaves) < 2:
        return None
    batch_sizes = leaves[1]
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1:
        return None
    sequences = list(_held_by_callers(batch_sizes))
    if not sequences or not all(_same_order(sequences[0], other) for other in sequences[1:]):
        return Packing(batch_sizes, found=False)
    first = sequences[0]
    return Packing(batch_sizes, None if first.sorted_indices is None else first.unsorted_indices)


def without_dropout(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
    """Return the arguments of a function given packed sequences with its dropout off, and whether it was on.

    Dropout between layers draws for the rows as they are packed: were it on while samples are compared, one of another
    length would change what is drawn for all others.
    """
    if len(args) < 8:
        return args, False
    num_layers, dropout, train = args[5:8]
    return (*args[:6], 0.0, *args[7:]), bool(train and dropout and num_layers > 1)


def in_recurrent_utilities() -> bool:
    """Whether torch's own functions for packed sequences or recurrent layers run, which reorder and restore."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in _UTILITIES:
        frame = frame.f_back
    return frame is not None


def _held_by_callers(batch_sizes: Tensor) -> Iterator[PackedSequence]:
    """Yield the packed sequences with these very batch sizes, from the local variables of the calling functions."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        for value in frame.f_locals.values():
            if isinstance(value, PackedSequence) and value.batch_sizes is batch_sizes:
                yield value
        frame = frame.f_back


def _same_order(one: PackedSequence, other: PackedSequence) -> bool:
    """Whether two packed sequences agree; one that was made of another's parts may have lost its order."""
    mine, its = one.sorted_indices, other.sorted_indices
    return mine is its or (mine is not None and its is not None and torch.equal(mine.cpu(), its.cpu()))
