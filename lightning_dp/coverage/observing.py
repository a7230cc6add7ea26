"""What the engine says about every trained parameter of a model, from one physical batch that is never released.

Owns: the noted passes over the batch, and what is read off them. Does not own: the engine (``bookkeeping``), how a
batch comes about, or what is shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book, LoopKeeping
from lightning_dp.bookkeeping.noting import NotingBook, NotingKeeping, Refusal, Use
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.source import opaque_uses
from lightning_dp.coverage.report import Coverage, Covered
from lightning_dp.coverage.timing import seconds_of
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.checks import check_loss
from lightning_dp.strategies.observing import Observer, undisturbed

_NUM_PASSES, _MAX_PASSES = 3, 20
"""How many passes are made, so that the smallest time counts; and at most, where layers may be dropped at random."""

LOOP = "loop: one backward pass per sample"


@dataclass(frozen=True)
class Trial:
    """A training step that can be tried without a trace.

    Args:
        module: The user's module.
        trained: The trained parameters, by name.
        others: Further parameters that require a gradient.
        batch: A physical batch, on the device.
        num_samples: B, the samples in it.
        singles: Some batches of one sample, for the loop; none for the book.
        run_step: Runs the training step on a batch.
        observer: Lets an engine observe the model.
    """

    module: pl.LightningModule
    trained: Mapping[str, nn.Parameter]
    others: Mapping[str, nn.Parameter]
    batch: Any
    num_samples: int
    singles: tuple[Any, ...]
    run_step: Callable[[Any], Any]
    observer: Observer

    def loss(self, batch: Any = None) -> Tensor:
        """Return the loss of a batch, by default of the whole one.

        Raises:
            UnsupportedModelError: If there is none.
        """
        output = self.run_step(self.batch if batch is None else batch)
        check_loss(output)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise UnsupportedModelError(
                "the training step returned no loss for a physical batch of the training data, so it cannot be seen "
                "what it does with the parameters. Return a loss for every batch."
            )
        return loss

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Put everything back afterwards, gradients too."""
        gradients = [(p, p.grad) for p in self.module.parameters()]
        self.drop_gradients()
        try:
            with undisturbed(self.module):
                yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def drop_gradients(self) -> None:
        """Leave no ``.grad`` anywhere."""
        for p in self.module.parameters():
            p.grad = None


def observe_coverage(trial: Trial) -> tuple[Coverage, str]:
    """Return what the book-keeping does with every parameter, and why it cannot be told in full, if so."""
    names = {id(p): name for name, p in trial.trained.items()}
    with trial.without_trace():
        opaque = dict(opaque_uses(trial.loss(), names))
    refused = tuple(Refusal((name,), "", "", str(error)) for name, error in opaque.items())
    trained = {name: p for name, p in trial.trained.items() if name not in opaque}
    keeping = NotingKeeping(trained, {**trial.others, **{name: trial.trained[name] for name in opaque}})
    passes, problem = _Passes(trial, keeping, trained), ""
    try:
        trial.observer.observe(keeping, trained, check=False)
        passes.run()
    except UnsupportedModelError as error:
        keeping.abandon()
        problem = str(error)
    return passes.coverage(refused, complete=not problem), problem


def loop_coverage(trial: Trial) -> Coverage:
    """Return what the loop over the samples does: the same with every parameter."""
    keeping = LoopKeeping(trial.trained, trial.others)
    with trial.without_trace():
        trial.loss(trial.singles[0]).backward()
        book = keeping.close()
    held = {name: _bytes(_held(book, name)) for name in book.entries}
    covered = tuple(
        Covered(name, tuple(p.shape), (), (LOOP,), held[name]) for name, p in trial.trained.items() if name in held
    )
    unused = tuple(name for name in trial.trained if name not in held)
    return Coverage(covered, unused, bytes_per_sample=sum(held.values()))


class _Passes:
    """Noted passes over one batch, until every parameter was seen that is going to be."""

    def __init__(self, trial: Trial, keeping: NotingKeeping, trained: Mapping[str, nn.Parameter]) -> None:
        self._trial, self._keeping, self._trained = trial, keeping, trained
        self._rows: dict[str, Covered] = {}
        self._refusals: list[Refusal] = []
        self._count, self._bytes_per_sample, self._draws = 0, 0.0, False

    def run(self) -> None:
        """Run as many passes as are wanted, each with random numbers of its own."""
        with self._trial.without_trace():
            while self._wants_more():
                before = RandomState.of_all()
                with self._keeping.recording(self._trial.num_samples):
                    loss = self._trial.loss()
                with self._keeping.recording():
                    loss.backward()
                self._take(self._keeping.close())
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

    def _take(self, book: NotingBook) -> None:
        """Take what a book says of its parameters; the smallest of several times counts."""
        seconds = {name: _seconds(book, name) for name in book.entries}
        own = (*self._trial.module.parameters(), *self._trial.module.buffers())
        apart = {t.untyped_storage().data_ptr() for t in own}
        for name in book.entries:
            uses = [use for use in book.uses if use.parameter == name]
            self._rows[name] = Covered(
                name=name,
                shape=tuple(self._trained[name].shape),
                functions=_functions(uses),
                methods=_methods(book, name, uses),
                bytes_per_sample=_bytes(_tensors(uses), apart) / book.num_samples,
                seconds=min(seconds[name], self._seconds_before(name)),
            )
        held = _bytes(_tensors(book.uses), apart) / book.num_samples
        self._bytes_per_sample = max(self._bytes_per_sample, held)
        self._refusals += book.refusals
        self._count += 1

    def _seconds_before(self, name: str) -> float:
        before = self._rows[name].seconds if name in self._rows else None
        return math.inf if before is None else before


@torch.no_grad()
def _seconds(book: NotingBook, name: str) -> float:
    """Return the time for the entries of one parameter, its norms and its clipped sum."""
    one = Book(book.num_samples, {name: book.entries[name]})
    weight = torch.ones(book.num_samples, device=book.entries[name][0].device)
    filing = sum(use.seconds for use in book.uses if use.parameter == name)
    return filing + seconds_of(lambda: _norms_and_sums(one, weight))


def _norms_and_sums(book: Book, weight: Tensor) -> None:
    book.norm_sq()
    book.weighted_sums(weight)


def _functions(uses: Iterable[Use]) -> tuple[str, ...]:
    counts = Counter(use.function + _derivation(use) for use in uses)
    return tuple(f"{function} ×{count}" if count > 1 else function for function, count in counts.items())


def _derivation(use: Use) -> str:
    """Return `` (derived: to(embedding))`` for a parameter that entered through functions of parameters alone."""
    return f" (derived: {'('.join(use.derivation)}{')' * (len(use.derivation) - 1)})" if use.derivation else ""


def _methods(book: NotingBook, name: str, uses: Iterable[Use]) -> tuple[str, ...]:
    several = ("cross terms",) if len(book.entries[name]) > 1 else ()
    return (*dict.fromkeys(use.method for use in uses), *several)


def _tensors(uses: Iterable[Use]) -> Iterator[Tensor]:
    for use in uses:
        yield from use.saved
        for entry in use.entries:
            yield from entry.held


def _held(book: Book, name: str) -> Iterator[Tensor]:
    for entry in book.entries[name]:
        yield from entry.held


def _bytes(tensors: Iterable[Tensor], apart: Iterable[int] = ()) -> int:
    """Return the size of the memory behind tensors, views of one memory counted once, without what is held anyway."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for at, size in sizes.items() if at not in set(apart))
