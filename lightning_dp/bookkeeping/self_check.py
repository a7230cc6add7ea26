"""The self-check: whether the bound on one sample holds for this model, loss and data, before it is relied on.

Owns: the properties and their messages. Does not own: where samples come from, or the observation of axes.

On batches of two to three samples of the user's own dataset, in training mode:

- (a) for one sample, the norm in the book is the norm of autograd's gradient;
- (b) for several, the sum of the book's entries is autograd's gradient;
- (c) a sample's contribution does not change when its neighbour in the batch is another, nor, with equal random draws
  for all samples, when it is left out;
- (d) no buffer or parameter is written with what the samples contain.

(a) and (b) find a wrong rule of this library; (c) finds everything that couples samples, which no library can clip.
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
from lightning_dp.bookkeeping.culprit import where_samples_meet
from lightning_dp.bookkeeping.draws import EqualDraws, Shapes
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.errors import UnsupportedModelError

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


def self_check(subject: Subject) -> None:
    """Check properties (a) to (d).

    Raises:
        UnsupportedModelError: Naming the property that does not hold, the parameters at fault and the way out.
    """
    _Check(subject).run()


class _Check:
    """One run of the self-check; every pass starts from the same buffers and random numbers."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._state = subject, RandomState.of_all()
        self._values = {name: buffer.detach().clone() for name, buffer in subject.state.items()}

    def run(self) -> None:
        """Check everything."""
        try:
            self._check_one_sample()  # a function whose gradient was refused by the observation says so here
            alike, unlike = self._check_first(self._check_sum())
            self._check_neighbours(alike, unlike)
            self._check_left_out()
        finally:
            self._restore()

    def _check_one_sample(self) -> None:
        samples, draws = self._subject.smallest, self._equal_draws
        with draws():
            norms = merged([book.norm_sq_by_parameter() for book in self._books(samples)])
        with draws():
            gradients = self._autograd(samples)
        copies = len(samples) if self._subject.mean_loss else 1  # of a mean over copies, each has its share
        booked = self._alike({name: float(part[0].sqrt()) * copies for name, part in norms.items()})
        lengths, *_ = self._lengths(gradients)
        total = _length(lengths)
        wrong = [
            f"'{name}' ({booked.get(name, 0.0):.6g} in the book, {lengths[name]:.6g} by autograd)"
            for name, g in gradients.items()
            if abs(booked.get(name, 0.0) - lengths[name]) > self._tolerance(g) * (lengths[name] + 1e-3 * total)
        ]
        if wrong:
            raise UnsupportedModelError(
                "self-check (a): for a single sample the norm in the book is not that of autograd's gradient, for "
                f"{_some(wrong)}. {_OUR_FAULT}"
            )

    def _check_sum(self) -> Gradients | None:
        """Check property (b); return what the second sample contributes, if draws make no difference to that."""
        gradients, books = self._autograd("aab"), self._books("aab")
        lengths, _, missing = self._lengths(gradients, self._sums(books, torch.ones(3)))
        total = _length(lengths)
        wrong = [
            f"'{name}'"
            for name, g in gradients.items()
            if missing[name] > self._tolerance(g) * (lengths[name] + 1e-3 * total)
        ]
        if wrong:
            raise UnsupportedModelError(
                "self-check (b): the samples' gradients in the book do not add up to autograd's gradient, for "
                f"{_some(wrong)}. {_OUR_FAULT}"
            )
        del gradients
        return None if self._drawn_for_two else dict(self._sums(books, torch.eye(3)[1]))

    def _check_first(self, one: Gradients | None) -> tuple[str, str]:
        """Compare what the second sample contributes; return which others draw the same as the first, and which not.

        Beside one of another length, padding included, all samples draw other numbers: then nothing is to be drawn.

        Args:
            one: What it contributes beside the first, from a pass that drew nothing.
        """
        alike, drawn = "", []
        if one is None:
            with EqualDraws() as draws:
                one, drawn = dict(self._contribution("aab", 1)), draws.drawn
        written = self._written
        for other in self._subject.others:
            with EqualDraws() as its_draws:
                two = self._contribution(f"{other}ab", 1)
            self._check_written(written, self._written)
            if drawn == its_draws.drawn:
                alike += other
                with EqualDraws():
                    self._compare(one, two, _ANOTHER)
            del two  # before the next pass: it holds the book of this one
        return alike, "".join(other for other in self._subject.others if other not in alike)

    def _check_neighbours(self, alike: str, unlike: str) -> None:
        """Compare what samples contribute when the first one is another, and when the second one is.

        Args:
            alike: Other samples that draw the same as the first.
            unlike: Those that do not.
        """
        self._check_beside(self._subject.evaluating, 1, ["aab", *(f"{other}ab" for other in unlike)])
        for drawing, others in ((EqualDraws, alike), (self._subject.evaluating, unlike)):
            # A sample ahead of all others may have taken part of their gradients, which no other shows; only the last
            # of a batch may reach them; and the maximum of a batch moves only with the sample that has it.
            second = ["aab", *(f"a{other}b" for other in others)]
            last = [f"aa{other}" for other in ("a", *others) if other != "b"]
            for batches in [second + last] if "b" in others else [second, last]:
                self._check_beside(drawing, 0, batches)
            self._check_beside(drawing, 2, ["aab", *(f"{other}{other}b" for other in others)])

    def _check_beside(
        self, drawing: Callable[[], AbstractContextManager[object]], at: int, batches: Sequence[str]
    ) -> None:
        """Compare what the sample at a place contributes to the first batch and to the others."""
        first, *others = batches
        if not others:
            return
        with drawing():
            one = dict(self._contribution(first, at))
        for other in others:
            with drawing():
                self._compare(one, self._contribution(other, at), _ANOTHER)

    def _check_written(self, written: Gradients, other: Gradients) -> None:
        for name, value in written.items():
            if not torch.allclose(value, other[name], rtol=1e-4, atol=1e-6, equal_nan=True):
                raise UnsupportedModelError(
                    f"self-check (d): the training step writes into '{name}', a buffer or parameter, what depends on "
                    "the samples of the batch, so it would be released without noise. Do not update it while training, "
                    "or compute it from public data beforehand."
                )

    def _check_left_out(self) -> None:
        """Compare in training mode; if that fails, in evaluation mode, where no kernel draws numbers of its own."""
        if self._agree(*self._left_out()):
            return
        with self._subject.evaluating():
            self._compare(*self._left_out(), "when another sample was left out of the batch")

    def _left_out(self) -> tuple[Gradients, Gradients]:
        """Return what a sample contributes to a batch of two, and to one of three."""
        draws, mean = self._equal_draws, self._subject.mean_loss
        with draws():
            alone = dict(self._contribution("ab", 1, 2.0 if mean else 1.0))
        with draws():
            return alone, self._contribution("aab", 2, 3.0 if mean else 1.0)

    def _agree(self, one: Gradients, two: Gradients) -> bool:
        lengths, its_lengths, moved = self._lengths(one, two)
        return _length(moved) <= self._coarsest(one) * max(_length(lengths), _length(its_lengths))

    def _compare(self, one: Gradients, two: Gradients, event: str) -> None:
        if self._agree(one, two):
            return
        *both, moved = self._lengths(one, two)
        lengths, tolerance = [_length(each) for each in both], self._coarsest(one)
        self._restore()
        where = where_samples_meet(self._subject.batch, self._subject.gradients)
        size = f"its length went from {lengths[0]:.4g} to {lengths[1]:.4g}"
        (along,) = self._subject.add_up(
            [sum(float((one[name].double() * two[name].double()).sum()) for name in one.keys() & two.keys())]
        )
        if along > (1 - tolerance**2) * lengths[0] * lengths[1] > 0:
            reduction = "mean" if self._subject.mean_loss else "sum"
            raise UnsupportedModelError(
                f"self-check (c): the gradient of a sample was rescaled {event} ({size}): the loss weighs a sample by "
                f"what else is in the batch{where}. A mean over the tokens of all samples (padded, or with "
                "ignore_index) does this: take the mean of each sample first, "
                "lightning_dp.per_sample_mean(token_losses, mask). Otherwise the loss is not the "
                f"{reduction} over the samples that DPStrategy(loss_reduction='{reduction}') says."
            )
        most = sorted(moved, key=lambda name: -moved[name])
        raise UnsupportedModelError(
            f"self-check (c): the gradient of a sample changed {event} ({size}; most for "
            f"{_some([repr(name) for name in most])}): samples influence each other{where}. A contrastive loss, a "
            "statistic of the batch, or control flow that depends on the batch does this: compute the loss of each "
            "sample from that sample alone."
        )

    # ---- passes --------------------------------------------------------------------------------------------------

    @cached_property
    def _drawn_for_two(self) -> list[Shapes]:
        """What a pass over two samples draws."""
        with EqualDraws() as draws:
            self._books("ab")
        return draws.drawn

    @cached_property
    def _equal_draws(self) -> Callable[[], EqualDraws]:
        """Return the context of a pass in which all samples get the same random draws."""
        if not self._drawn_for_two:
            return EqualDraws
        with EqualDraws() as of_three:
            self._books("aab")
        return lambda: EqualDraws(self._drawn_for_two, of_three.drawn)

    def _contribution(self, samples: str, at: int, scale: float = 1.0) -> Gradients:
        """Return the gradients in the books of the sample at a place, times a number."""
        return self._sums(self._books(samples), scale * torch.eye(len(samples))[at])

    def _sums(self, books: Sequence[Book], weight: Tensor) -> Gradients:
        return Sums(books, weight.double(), self._subject.hold)

    def _books(self, samples: str) -> Sequence[Book]:
        self._restore()
        books = self._subject.books(self._subject.batch(samples), len(samples))
        self._written = {name: buffer.detach().clone() for name, buffer in self._subject.state.items()}
        return books

    def _autograd(self, samples: str) -> Gradients:
        self._restore()
        return merged(self._subject.gradients(self._subject.batch(samples)))

    # ---- numbers, the same in all processes ------------------------------------------------------------------------

    def _lengths(self, one: Gradients, two: Gradients = MappingProxyType({})) -> list[dict[str, float]]:
        """Return the lengths of ``one``, of ``two`` and of ``one - two``, in which a parameter may be missing: zero."""
        names = sorted({*one, *two})
        squares = [square for n in names for square in squared_lengths(one.get(n), two.get(n))]
        lengths = list(map(math.sqrt, self._subject.add_up(squares)))
        return [dict(zip(names, lengths[k::3], strict=True)) for k in range(3)]

    def _alike(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the means over all processes of what differs by rounding at most."""
        *sums, count = self._subject.add_up([*map(numbers.__getitem__, sorted(numbers)), 1.0])
        return {name: found / count for name, found in zip(sorted(numbers), sums, strict=True)}

    def _tolerance(self, g: Tensor) -> float:
        return _COARSE if self._subject.coarse else _TOLERANCE.get(g.dtype, _COARSE)

    def _coarsest(self, gradients: Gradients) -> float:
        return max(map(self._tolerance, gradients.values()), default=0.0)

    def _restore(self) -> None:
        self._state.restore()
        with torch.no_grad():
            for name, buffer in self._subject.state.items():
                buffer.copy_(self._values[name])


_ANOTHER = "when its neighbour in the batch was another"

_OUR_FAULT = (
    "Either a rule of this library for an operation that they enter is wrong: please report it; or the training step "
    "draws random numbers that no seed decides. DPStrategy(clipping_engine='loop') trains without the book."
)


def _length(lengths: Mapping[str, float]) -> float:
    return math.hypot(*lengths.values())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
