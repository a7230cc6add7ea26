"""What the engine says about every trained parameter of a model, from one physical batch that is never released.

Owns: the noted passes over the batch, and what is read off them. Does not own: the engine (``bookkeeping``), how a
batch comes about, or what is shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book, BookKeeping, Keeping, LoopKeeping
from lightning_dp.bookkeeping.noting import NotingBook, NotingKeeping, Refusal, Use
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.source import Opaque
from lightning_dp.coverage.report import Coverage, Covered
from lightning_dp.coverage.timing import seconds_of
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.preparing import Found
from lightning_dp.strategies.trials import AutomaticTrial, ManualTrial
from lightning_dp.strategies.undisturbed import undisturbed_at_full_speed

_NUM_PASSES, _MAX_PASSES = 3, 20
"""How many passes are made, so that the smallest time counts; and at most, where layers may be dropped at random."""

LOOP = "loop: one backward pass per sample"


@dataclass(frozen=True)
class Bench:
    """A training step that can be tried on one physical batch without a trace.

    Args:
        module: The user's module.
        found: What the training step trains.
        trial: Runs it on batches that lie on the device.
        batch: A physical batch on the device.
        num_samples: B, the samples in it.
        singles: Some batches of one sample, for the loop; none for the book.
    """

    module: pl.LightningModule
    found: Found
    trial: AutomaticTrial | ManualTrial
    batch: Any
    num_samples: int
    singles: tuple[Any, ...]

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Put everything back afterwards, gradients too."""
        gradients = [(p, p.grad) for p in self.module.parameters()]
        self.drop_gradients()
        try:
            with undisturbed_at_full_speed(self.module):
                yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def drop_gradients(self) -> None:
        """Leave no ``.grad`` anywhere."""
        for p in self.module.parameters():
            p.grad = None

    def books(self, keeping: Keeping, batch: Any, num_samples: int) -> list[Book]:
        """Return the book of every release."""
        if isinstance(self.trial, AutomaticTrial):
            return self.trial.books(keeping, batch, num_samples)
        assert isinstance(keeping, BookKeeping), "the loop is for automatic optimization"
        return self.trial.books(keeping, batch, num_samples)

    def run_ordinary(self, batch: Any = None) -> None:
        """Run forward and backward passes without privacy, by default on the whole batch; gradients stay in ``.grad``.

        Raises:
            UnsupportedModelError: If there is no loss.
        """
        batch = self.batch if batch is None else batch
        if isinstance(self.trial, ManualTrial):
            self.trial.steps(batch)
            return
        loss = self.trial.loss(batch)
        if loss is None:
            raise UnsupportedModelError(
                "the training step returned no loss for a physical batch of the training data, so it cannot be seen "
                "what it does with the parameters. Return a loss for every batch."
            )
        loss.backward()


def observe_coverage(bench: Bench) -> tuple[Coverage, str]:
    """Return what the book-keeping does with every parameter, and why it cannot be told in full, if so."""
    trained, hidden = dict(bench.found.trained), dict[str, str]()
    passes, problem = _Passes(bench, trained), ""
    while True:
        keeping = NotingKeeping(trained, {**bench.found.others, **{name: bench.found.trained[name] for name in hidden}})
        try:
            if trained:
                bench.found.observer.look(keeping)
                passes.run(keeping)
        except Opaque as error:
            hidden |= {name: reason for name, reason in error.reasons.items() if name in trained}
            for name in error.reasons:  # what remains may still be seen, and refused
                trained.pop(name, None)
            continue
        except UnsupportedModelError as error:
            keeping.abandon()
            problem = str(error)
        break
    told = [Refusal((name,), "", "", reason) for name, reason in hidden.items()]
    return passes.coverage(told, complete=not problem), problem


def loop_coverage(bench: Bench) -> Coverage:
    """Return what the loop over the samples does: the same with every parameter."""
    keeping, trained = LoopKeeping(bench.found.trained, bench.found.others), bench.found.trained
    with bench.without_trace():
        bench.run_ordinary(bench.singles[0])
        book = keeping.close()
    held = {name: _bytes(entry.g for entry in entries) for name, entries in book.entries.items()}
    covered = tuple(
        Covered(name, tuple(p.shape), (), (LOOP,), held[name]) for name, p in trained.items() if name in held
    )
    unused = tuple(name for name in trained if name not in held)
    return Coverage(covered, unused, bytes_per_sample=sum(held.values()))


class _Passes:
    """Noted passes over one batch, until every parameter was seen that is going to be."""

    def __init__(self, bench: Bench, trained: Mapping[str, nn.Parameter]) -> None:
        self._bench, self._trained = bench, trained
        self._rows: dict[str, Covered] = {}
        self._refusals: list[Refusal] = []
        self._count, self._bytes_per_sample, self._draws = 0, 0.0, False

    def run(self, keeping: NotingKeeping) -> None:
        """Run as many passes as are wanted, each with random numbers of its own."""
        with self._bench.without_trace():
            while self._wants_more():
                before = RandomState.of_all()
                books = self._bench.trial.books(keeping, self._bench.batch, self._bench.num_samples)
                self._take(keeping.noted, books)
                self._draws = RandomState.of_all().differs_from(before)

    def coverage(self, refused: Iterable[Refusal], complete: bool) -> Coverage:
        """Return what was seen; only after complete passes it is known what is unused."""
        told = (*refused, *self._refusals)
        names = {name for refusal in told for name in refusal.parameters}
        seen = [self._rows[name] for name in self._trained if name in self._rows]
        rows = [replace(row, methods=(*row.methods, "refused")) if row.name in names else row for row in seen]
        unused = [name for name in self._trained if name not in self._rows and name not in names]
        return Coverage(tuple(rows), tuple(unused) if complete else (), told, self._bytes_per_sample)

    def _wants_more(self) -> bool:
        if self._refusals:
            return False
        layers_dropped = self._draws and not self._rows.keys() >= self._trained.keys()
        return self._count < (_MAX_PASSES if layers_dropped else _NUM_PASSES)

    def _take(self, notes: NotingBook, books: list[Book]) -> None:
        """Take what a pass shows of its parameters; the smallest of several times counts."""
        own = (*self._bench.module.parameters(), *self._bench.module.buffers())
        apart = {t.untyped_storage().data_ptr() for t in own}
        for name in dict.fromkeys(name for book in books for name in book.entries):
            uses = [use for use in notes.uses if use.parameter == name]
            released = [Book(book.num_samples, {name: book.entries[name]}) for book in books if name in book.entries]
            seconds = sum(use.seconds for use in uses) + sum(map(_seconds, released))
            self._rows[name] = Covered(
                name=name,
                shape=tuple(self._trained[name].shape),
                functions=_functions(uses),
                methods=_methods(uses, crossed=any(len(book.entries[name]) > 1 for book in released)),
                bytes_per_sample=_bytes(_tensors(uses), apart) / notes.num_samples,
                seconds=min(seconds, self._seconds_before(name)),
            )
        self._bytes_per_sample = max(self._bytes_per_sample, _bytes(_tensors(notes.uses), apart) / notes.num_samples)
        self._refusals += notes.refusals
        self._count += 1

    def _seconds_before(self, name: str) -> float:
        before = self._rows[name].seconds if name in self._rows else None
        return math.inf if before is None else before


@torch.no_grad()
def _seconds(book: Book) -> float:
    """Return the time for norms and clipped sums."""
    weight = torch.ones(book.num_samples)

    def clip() -> None:
        book.weighted_sums(weight.to(book.norm_sq()))

    return seconds_of(clip)


def _functions(uses: Iterable[Use]) -> tuple[str, ...]:
    counts = Counter(use.function + _derivation(use) for use in uses)
    return tuple(f"{function} ×{count}" if count > 1 else function for function, count in counts.items())


def _derivation(use: Use) -> str:
    """Return `` (derived: to(embedding))`` for a parameter that entered through functions of parameters alone."""
    return f" (derived: {'('.join(use.derivation)}{')' * (len(use.derivation) - 1)})" if use.derivation else ""


def _methods(uses: Iterable[Use], crossed: bool) -> tuple[str, ...]:
    return (*dict.fromkeys(use.method for use in uses), *(("cross terms",) if crossed else ()))


def _tensors(uses: Iterable[Use]) -> Iterator[Tensor]:
    for use in uses:
        yield from use.saved
        for entry in use.entries:
            yield from entry.held


def _bytes(tensors: Iterable[Tensor], apart: Iterable[int] = ()) -> int:
    """Return the size of the memory behind tensors, views of one memory counted once, without what is held anyway."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for at, size in sizes.items() if at not in set(apart))
