"""Gradients of whole models that are compared: as few of them in memory at a time as that takes.

Owns: sums that are found one parameter at a time, and the lengths of two gradients and of their difference. Does not
own: what is compared (``self_check``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book

Gradients = Mapping[str, Tensor]

T = TypeVar("T")

_PIECE = 2**20
"""Elements that are compared at once: float64 values of a whole embedding take more memory than many a model."""


class Sums(Gradients):
    """The sums of what is in books, each found when it is asked for: together they are as large as the model.

    Args:
        books: One for each release.
        weight: Of every sample, ``[B]``.
        hold: Returns what is to be kept of the sum of a parameter, by its name.
    """

    def __init__(self, books: Sequence[Book], weight: Tensor, hold: Callable[[str, Tensor], Tensor]) -> None:
        self._weight, self._hold = weight, hold
        self._at = merged([{name: (book, name) for name in book.entries} for book in books])

    def __getitem__(self, name: str) -> Tensor:
        book, own = self._at[name]
        return book.weighted_sums(self._weight, self._hold, [own])[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


def merged(releases: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """Return what several releases are made of as one, with a number where they share a parameter."""
    found: dict[str, T] = {}
    for k, release in enumerate(releases):
        # By its number alone: a book leaves out parameters that it has no gradient of, and autograd's has zeros there.
        found |= {f"{name} (release {k + 1})" if k else name: value for name, value in release.items()}
    return found


def squared_lengths(one: Tensor | None, two: Tensor | None) -> list[float]:
    """Return the squared lengths of two gradients of a parameter and of their difference, in float64.

    Args:
        one: A gradient; ``None`` for zero.
        two: The same, on any device.
    """
    if one is None or two is None:
        length = sum((piece.double().square().sum().item() for piece in _pieces(one if two is None else two)), 0.0)
        return [0.0 if one is None else length, 0.0 if two is None else length, length]
    total = torch.zeros(3, dtype=torch.float64, device=one.device)
    for a, b in zip(_pieces(one), _pieces(two), strict=True):
        a, b = a.double(), b.to(one.device).double()
        total += torch.stack([t.square().sum() for t in (a, b, a - b)])
    return total.tolist()


def _pieces(t: Tensor | None) -> Sequence[Tensor]:
    return () if t is None else t.reshape(-1).split(_PIECE)
