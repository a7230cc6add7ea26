"""The passes of the self-check, and what is compared of them.

Owns: that they all begin alike, and that every process finds the same numbers. Does not own: which properties are
checked (``self_check``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.comparing import Gradients, Sums, merged, squared_lengths
from lightning_dp.bookkeeping.draws import EqualDraws
from lightning_dp.bookkeeping.random_state import RandomState

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_COARSE = 5e-2
"""For 16-bit parameters, and where autocast computes in 16 bits."""


@dataclass(frozen=True)
class Subject:
    """What is checked.

    A training step has one book for each release that would be made of it, and as many ordinary gradients.

    Args:
        state: What the training step may write, by name: buffers, and the parameters that it was seen to write.
        batch: Returns a batch of the samples named by a string: ``"aab"`` is ``[a, a, b]``.
        books: Runs the training step on a batch, with its number of samples, through the observed book-keeping.
        gradients: Runs the training step on a batch by autograd alone.
        evaluating: Context in which the model is in evaluation mode.
        mean_loss: Whether the loss is the mean over the batch, rather than the sum.
        others: Further samples, as single letters, to put in the place of a neighbour.
        coarse: Whether the model computes in 16 bits.
        smallest: The smallest batch that the training step can run on, ``"a"`` or, for some layers, ``"aa"``.
        hold: Returns what this process holds of a parameter's whole gradient, by its name; ``gradients`` has the same.
        add_up: Adds numbers up over all processes that hold parts; all of them come to the same conclusion.
    """

    state: Mapping[str, Tensor]
    batch: Callable[[str], Any]
    books: Callable[[Any, int], Sequence[Book]]
    gradients: Callable[[Any], Sequence[Gradients]]
    evaluating: Callable[[], AbstractContextManager[None]]
    mean_loss: bool = True
    others: str = "b"
    coarse: bool = False
    smallest: str = "a"
    hold: Callable[[str, Tensor], Tensor] = lambda _, whole: whole
    add_up: Callable[[list[float]], list[float]] = lambda numbers: numbers


class Passes:
    """Passes over batches of a few samples; every one starts from the same buffers and random numbers.

    Args:
        subject: What is checked.

    Attributes:
        written: What the last pass through the books wrote, by name.
    """

    written: Gradients

    def __init__(self, subject: Subject) -> None:
        self._subject, self._state = subject, RandomState.of_all()
        self._values = {name: buffer.detach().clone() for name, buffer in subject.state.items()}

    @cached_property
    def equal_draws(self) -> Callable[[], EqualDraws]:
        """Return the context of a pass in which all samples get the same random draws."""
        with EqualDraws() as of_two:
            self.books("ab")
        if not of_two.drawn:  # nothing is to be made equal, whatever three draw
            return EqualDraws
        with EqualDraws() as of_three:
            self.books("aab")
        return lambda: EqualDraws(of_two.drawn, of_three.drawn)

    def contribution(self, samples: str, at: int, scale: float = 1.0) -> Gradients:
        """Return the gradients in the books of the sample at a place, times a number."""
        return self.sums(self.books(samples), scale * torch.eye(len(samples))[at])

    def sums(self, books: Sequence[Book], weight: Tensor) -> Gradients:
        """Return the sums of what is in books, each sample's gradients times its weight."""
        return Sums(books, weight.double(), self._subject.hold)

    def books(self, samples: str) -> Sequence[Book]:
        """Run the training step through the books."""
        self.restore()
        books = self._subject.books(self._subject.batch(samples), len(samples))
        self.written = {name: buffer.detach().clone() for name, buffer in self._subject.state.items()}
        return books

    def autograd(self, samples: str) -> Gradients:
        """Run the training step by autograd alone."""
        self.restore()
        return merged(self._subject.gradients(self._subject.batch(samples)))

    def restore(self) -> None:
        """Put back what passes write."""
        self._state.restore()
        with torch.no_grad():
            for name, buffer in self._subject.state.items():
                buffer.copy_(self._values[name])

    def lengths(self, one: Gradients, two: Gradients = MappingProxyType({})) -> list[dict[str, float]]:
        """Return the lengths of ``one``, of ``two`` and of ``one - two``, in which a parameter may be missing: zero."""
        names = sorted({*one, *two})
        squares = [square for n in names for square in squared_lengths(one.get(n), two.get(n))]
        lengths = list(map(math.sqrt, self._subject.add_up(squares)))
        return [dict(zip(names, lengths[k::3], strict=True)) for k in range(3)]

    def alike(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the means over all processes of what differs by rounding at most."""
        *sums, count = self._subject.add_up([*map(numbers.__getitem__, sorted(numbers)), 1.0])
        return {name: found / count for name, found in zip(sorted(numbers), sums, strict=True)}

    def tolerance(self, g: Tensor) -> float:
        """Return the share of its length by which a gradient may differ."""
        return _COARSE if self._subject.coarse else _TOLERANCE.get(g.dtype, _COARSE)

    def coarsest(self, gradients: Gradients) -> float:
        """Return the largest of their tolerances."""
        return max(map(self.tolerance, gradients.values()), default=0.0)
