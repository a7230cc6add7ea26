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

import torch

from lightning_dp.bookkeeping.comparing import Gradients, merged
from lightning_dp.bookkeeping.culprit import where_samples_meet
from lightning_dp.bookkeeping.draws import Draws, EqualDraws
from lightning_dp.bookkeeping.passes import Passes, Subject
from lightning_dp.errors import UnsupportedModelError


def self_check(subject: Subject) -> None:
    """Check properties (a) to (d).

    Raises:
        UnsupportedModelError: Naming the property that does not hold, the parameters at fault and the way out.
    """
    _Check(subject).run()


class _Check:
    """One run of the self-check."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._passes = subject, Passes(subject)

    def run(self) -> None:
        """Check everything."""
        try:
            self._check_one_sample()  # a function whose gradient was refused by the observation says so here
            alike, unlike = self._check_first(self._check_sum())
            self._check_neighbours(alike, unlike)
            self._check_left_out()
        finally:
            self._passes.restore()

    def _check_one_sample(self) -> None:
        samples, draws = self._subject.smallest, self._passes.equal_draws
        with draws():
            norms = merged([book.norm_sq_by_parameter() for book in self._passes.books(samples)])
        with draws():
            gradients = self._passes.autograd(samples)
        copies = len(samples) if self._subject.mean_loss else 1  # of a mean over copies, each has its share
        booked = self._passes.alike({name: float(part[0].sqrt()) * copies for name, part in norms.items()})
        lengths, *_ = self._passes.lengths(gradients)
        total = _length(lengths)
        wrong = [
            f"'{name}' ({booked.get(name, 0.0):.6g} in the book, {lengths[name]:.6g} by autograd)"
            for name, g in gradients.items()
            if abs(booked.get(name, 0.0) - lengths[name]) > self._passes.tolerance(g) * (lengths[name] + 1e-3 * total)
        ]
        if wrong:
            raise UnsupportedModelError(
                "self-check (a): for a single sample the norm in the book is not that of autograd's gradient, for "
                f"{_some(wrong)}. {_OUR_FAULT}"
            )

    def _check_sum(self) -> Gradients | None:
        """Check property (b); return what the second sample contributes, if the pass drew nothing."""
        gradients = self._passes.autograd("aab")
        with Draws() as draws:
            books = self._passes.books("aab")
        lengths, _, missing = self._passes.lengths(gradients, self._passes.sums(books, torch.ones(3)))
        total = _length(lengths)
        wrong = [
            f"'{name}'"
            for name, g in gradients.items()
            if missing[name] > self._passes.tolerance(g) * (lengths[name] + 1e-3 * total)
        ]
        if wrong:
            raise UnsupportedModelError(
                "self-check (b): the samples' gradients in the book do not add up to autograd's gradient, for "
                f"{_some(wrong)}. {_OUR_FAULT}"
            )
        del gradients
        return None if draws.seen else dict(self._passes.sums(books, torch.eye(3)[1]))

    def _check_first(self, one: Gradients | None) -> tuple[str, str]:
        """Compare what the second sample contributes; return which others draw the same as the first, and which not.

        Beside one of another length, padding included, all samples draw other numbers: then nothing is to be drawn.

        Args:
            one: What it contributes beside the first, from a pass that drew nothing; without it, a pass finds that out.
        """
        alike, drawn = "", []
        if one is None:
            with EqualDraws() as draws:
                one, drawn = dict(self._passes.contribution("aab", 1)), draws.drawn
        written = self._passes.written
        for other in self._subject.others:
            with EqualDraws() as its_draws:
                two = self._passes.contribution(f"{other}ab", 1)
            self._check_written(written, self._passes.written)
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
            one = dict(self._passes.contribution(first, at))
        for other in others:
            with drawing():
                self._compare(one, self._passes.contribution(other, at), _ANOTHER)

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
        draws, mean = self._passes.equal_draws, self._subject.mean_loss
        with draws():
            alone = dict(self._passes.contribution("ab", 1, 2.0 if mean else 1.0))
        with draws():
            return alone, self._passes.contribution("aab", 2, 3.0 if mean else 1.0)

    def _agree(self, one: Gradients, two: Gradients) -> bool:
        lengths, its_lengths, moved = self._passes.lengths(one, two)
        return _length(moved) <= self._passes.coarsest(one) * max(_length(lengths), _length(its_lengths))

    def _compare(self, one: Gradients, two: Gradients, event: str) -> None:
        if self._agree(one, two):
            return
        *both, moved = self._passes.lengths(one, two)
        lengths, tolerance = [_length(each) for each in both], self._passes.coarsest(one)
        self._passes.restore()
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
