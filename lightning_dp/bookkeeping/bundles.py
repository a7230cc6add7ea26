"""Materialised gradients of many small parameters, side by side in one matrix: one operator does the work of many.

Owns: which are small, their norms and their weighted sums. Does not own: any other entry (``entries``, ``products``).

Two of three parameter tensors of a transformer are biases and scales. Their arithmetic is next to nothing, but every
operator takes its time to be called, on a GPU to be launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.bookkeeping.entries import Dense, Entry, lengths, masked

_SMALL = {"cpu": 2**16, "cuda": 2**18}
"""So many elements, of all samples, are copied in less time than the calls take that this saves."""


@dataclass(eq=False)
class Bundle:
    """The gradients of small parameters of one type on one device.

    Args:
        members: The only entry of each parameter, by name.
        rows: Their gradients ``[B, n_1 + n_2 + ...]``, in that order.
    """

    members: Mapping[str, Dense]
    rows: Tensor

    def is_in(self, entries: Mapping[str, Sequence[Entry]]) -> bool:
        """Whether its members are still the only entries of their parameters."""
        return all(list(entries.get(name, ())) == [member] for name, member in self.members.items())

    def norm_sq(self) -> Tensor:
        """Return the squared norms over all of them, ``[B]``: found in 64 bits, since a row of them may be long."""
        return lengths(self.rows).square().to(self.rows.dtype)

    def pour(self, weight: Tensor, keep: Tensor | None, sums: MutableMapping[str, Tensor]) -> None:
        """Add ``sum_i weight[i] * G_i`` to the sums.

        Args:
            weight: ``[B]``.
            keep: Mask ``[B]`` of the samples that are not replaced by exact zeros; ``None`` for all.
            sums: By parameter, added to in place.
        """
        rows = self.rows if keep is None else masked(self.rows, keep)
        parts = (weight.to(rows) @ rows).split([entry.shape.numel() for entry in self.members.values()])
        found = {
            name: part if entry.g.dim() == 2 else part.view(entry.shape)
            for (name, entry), part in zip(self.members.items(), parts, strict=True)
        }
        before = [name for name in found if name in sums]
        if before:
            torch._foreach_add_([sums[name] for name in before], [found[name] for name in before])
        sums.update({name: part for name, part in found.items() if name not in sums})


def bundles_of(entries: Mapping[str, Sequence[Entry]]) -> Iterator[Bundle]:
    """Yield the bundles that the entries of parameters make, those of one parameter being alone in none."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Dense]] = {}
    for name, (first, *others) in entries.items():
        if not others and isinstance(first, Dense) and _is_small(first.g):
            groups.setdefault((first.g.device, first.g.dtype), {})[name] = first
    for group in groups.values():
        if len(group) > 1:
            yield Bundle(group, torch.cat([entry.g.reshape(entry.num_samples, -1) for entry in group.values()], 1))


def _is_small(g: Tensor) -> bool:
    return g.is_floating_point() and g.numel() <= _SMALL.get(g.device.type, 0)
