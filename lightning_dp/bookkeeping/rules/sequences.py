"""Sequences as a recurrent layer takes them, all of one length or packed, and as time steps of samples.

Owns: the change between both. Does not own: the gradients (``recurrent``).

Shapes: T steps, N sequences, L layers, D directions, B samples. *Native* is what the layer's function takes: time-major
``[T, N, k]``, or packed data ``[rows, k]``. *Steps* are always ``[T, N, k]``, with the sequences in the batch's order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis, merge_rows
from lightning_dp.bookkeeping.packing import Packing


class Sequences(ABC):
    """The sequences of one call of a recurrent layer's function."""

    @abstractmethod
    def call(self, func: Callable[..., Any], native: Tensor, *options: Any) -> Any:
        """Call the function on native sequences."""

    @abstractmethod
    def native(self, argument: Tensor) -> Tensor:
        """Return the function's own sequence argument or output as native sequences."""

    @abstractmethod
    def steps(self, native: Tensor) -> Tensor:
        """Return steps; zero after the end of a sequence."""

    @abstractmethod
    def states(self, states: Tensor) -> Tensor:
        """Return states ``[L D, N, k]`` with the sequences in the batch's order."""

    @abstractmethod
    def reversed(self, steps: Tensor) -> Tensor:
        """Return every sequence's steps in reverse order."""

    @abstractmethod
    def add_at_ends(self, steps: Tensor, states: Tensor) -> Tensor:
        """Return the steps with ``states`` ``[N, k]`` added to the last step of every sequence."""

    @abstractmethod
    def per_sample(self, steps: Tensor) -> Tensor:
        """Return all steps of every sample, ``[B, steps, k]``."""


class Padded(Sequences):
    """Sequences of one length.

    Args:
        batch_first: Whether the argument is ``[N, T, k]``.
        axis: The sample axis of ``[T, N, k]``.
        num_samples: B.
    """

    def __init__(self, batch_first: bool, axis: SampleAxis, num_samples: int) -> None:
        self._batch_first, self._axis, self._num_samples = batch_first, axis, num_samples

    def call(self, func: Callable[..., Any], native: Tensor, *options: Any) -> Any:
        """Call the function as the layer does."""
        return func(native, *options, False)

    def native(self, argument: Tensor) -> Tensor:
        """Return time-major sequences."""
        return argument.transpose(0, 1) if self._batch_first else argument

    def steps(self, native: Tensor) -> Tensor:
        """Return them as they are."""
        return native

    def states(self, states: Tensor) -> Tensor:
        """Return them as they are."""
        return states

    def reversed(self, steps: Tensor) -> Tensor:
        """Return the steps in reverse order."""
        return steps.flip(0)

    def add_at_ends(self, steps: Tensor, states: Tensor) -> Tensor:
        """Return the steps with something added to the last."""
        return torch.cat([steps[:-1], steps[-1:] + states])

    def per_sample(self, steps: Tensor) -> Tensor:
        """Return the steps of all rows of every sample."""
        return merge_rows(self._axis.split(steps, self._num_samples), 1)


class Packed(Sequences):
    """Packed sequences, one for each sample.

    Args:
        packing: Which row is whose.
        device: Where the data lies.
    """

    def __init__(self, packing: Packing, device: torch.device) -> None:
        rows, exists = packing.rows()
        self._batch_sizes, self._places = packing.batch_sizes, packing.places().to(device)
        self._rows, self._absent = rows.to(device), ~exists[:, :, None].to(device)
        lengths = exists.sum(0)
        steps = torch.arange(len(rows))[:, None]
        self._mirrored = torch.where(exists, lengths - 1 - steps, steps).to(device)
        self._last, self._every = (lengths - 1).to(device), torch.arange(rows.shape[1], device=device)

    def call(self, func: Callable[..., Any], native: Tensor, *options: Any) -> Any:
        """Call the function as the layer does."""
        return func(native, self._batch_sizes, *options)

    def native(self, argument: Tensor) -> Tensor:
        """Return the data as it is."""
        return argument

    def steps(self, native: Tensor) -> Tensor:
        """Return every row in its place."""
        # Not a product with a mask: after a sequence's end stands a row of another, which may be NaN.
        return native[self._rows].masked_fill(self._absent, 0)

    def states(self, states: Tensor) -> Tensor:
        """Return them in the batch's order."""
        return states[:, self._places]

    def reversed(self, steps: Tensor) -> Tensor:
        """Return every sequence mirrored within its length."""
        return steps[self._mirrored, self._every]

    def add_at_ends(self, steps: Tensor, states: Tensor) -> Tensor:
        """Return the steps with something added where every sequence ends."""
        return steps.index_put((self._last, self._every), states, accumulate=True)

    def per_sample(self, steps: Tensor) -> Tensor:
        """Return the steps of every sample, zeros after its end included."""
        return steps.transpose(0, 1)
