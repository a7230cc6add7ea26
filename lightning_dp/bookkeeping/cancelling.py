"""Samples whose gradients for a parameter nearly cancel out: positions against positions, or uses against uses.

Owns: which samples those are, and their gradients. Does not own: norms and sums of all others (``entries``).

A norm from Gram matrices has lost its digits there, and a sum over all samples would not give back what the terms of
such a sample took from the others' digits: both would break the bound on a sample. So its gradient is materialised, and
norm and sum come from the same numbers.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dp.bookkeeping.entries import Dense, Entry, lengths
from lightning_dp.bookkeeping.pairs import inner

_SHARE = 3e-4
"""Of the squared norm that a gradient would have if nothing cancelled: float32 rounds off a few 1e-4 of it."""

_SHARE_OF_RANDOM = 0.5
"""The same, divided by the number of terms: of random direction, T cancel to a share of 1 / T unharmed."""

_NEGLIGIBLE = 1e-12
"""A gradient that cannot be longer counts as long as it could be: nobody clips to so small a bound."""


def norms_sq_of(entries: Sequence[Entry]) -> tuple[Tensor, Tensor | None]:
    """Return the squared norm of the sum of the entries of one parameter, cross terms included, ``[B]``.

    Returns:
        The norms, and a mask ``[B]`` of the samples that nearly cancel or underflow, which `found_again` is to be asked
        about; ``None`` if none can.
    """
    own = [e.norm_sq() for e in entries]
    total = own[0]
    if len(entries) == 1 and (isinstance(entries[0], Dense) or entries[0].num_terms == 1):
        return total, None
    if len(entries) > 1:
        total = torch.stack(own).sum(0)
        for i, e in enumerate(entries):
            for f in entries[:i]:
                total = total + 2 * inner(e, f)
    share = min(_SHARE, _SHARE_OF_RANDOM / max(1, sum(e.num_terms for e in entries)))
    most = torch.stack([e.uncancelled().to(total) for e in entries]).sum(0)
    return total, total < share * most.square()


def found_again(entries: Sequence[Entry], i: int) -> tuple[float, Tensor | None]:
    """Return the squared norm of sample ``i``, and its materialised gradient; ``None`` if that is next to nothing."""
    most = sum(e.uncancelled_of(i) for e in entries)
    if most < _NEGLIGIBLE:
        return most**2, None
    gradient = gradient_of(entries, i)
    return float(lengths(gradient[None]).square()), gradient


def gradient_of(entries: Sequence[Entry], i: int) -> Tensor:
    """Return the materialised gradient of sample ``i``: where kernels add in one order, always the same numbers."""
    first, *others = (e.gradient_of(i) for e in entries)
    for other in others:
        first = first + other
    return first
