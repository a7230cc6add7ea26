"""What the engine says about every trained parameter of a model, from one physical batch that is never released.

Owns: the noted passes over the batch, and what is read off them. Does not own: the engine (``bookkeeping``), how a
batch comes about, or what is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book, LoopKeeping
from lightning_dp.bookkeeping.noting import NotingBook, NotingKeeping, Refusal, Use
from lightning_dp.bookkeeping.source import opaque_uses
from lightning_dp.coverage.report import Coverage, Covered
from lightning_dp.coverage.timing import seconds_of
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.strategies.checks import check_loss
from lightning_dp.strategies.observing import Observer, undisturbed

_NUM_PASSES = 3
"""Of that many measured times the smallest is taken."""

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
    try:
        trial.observer.observe(keeping, trained, check=False)
        passes = _Passes(trial, keeping)
        while passes.wants_more:
            passes.run()
    except UnsupportedModelError as error:
        keeping.abandon()
        return Coverage(refused=refused), str(error)
    return passes.coverage(refused), ""


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


@dataclass
class _Passes:
    """Noted passes over one batch: times from all of them, the rest from the last one."""

    trial: Trial
    keeping: NotingKeeping
    books: list[NotingBook] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    @property
    def wants_more(self) -> bool:
        return len(self.seconds) < _NUM_PASSES and not (self.books and self.books[-1].refusals)

    def run(self) -> None:
        """Run forward, backward, norms and clipped sums once."""
        self.books.clear()  # one at a time in memory
        with self.trial.without_trace():
            with self.keeping.recording(self.trial.num_samples):
                loss = self.trial.loss()
            with self.keeping.recording():
                loss.backward()
            book = self.keeping.close()
            self.books.append(book)
            self.seconds.append({name: _seconds(book, name) for name in book.entries})

    def coverage(self, refused: tuple[Refusal, ...]) -> Coverage:
        """Return what was seen."""
        (book,), trial = self.books, self.trial
        refused = (*refused, *book.refusals)
        uses = {name: [use for use in book.uses if use.parameter == name] for name in trial.trained}
        apart = {t.untyped_storage().data_ptr() for t in (*trial.module.parameters(), *trial.module.buffers())}
        refused_names = {name for refusal in refused for name in refusal.parameters}

        def per_sample(some: Iterable[Use]) -> float:
            return _bytes((t for use in some for t in _tensors(use)), apart) / book.num_samples

        covered = tuple(
            Covered(
                name,
                tuple(p.shape),
                _functions(uses[name]),
                (*_methods(book, name, uses[name]), *(("refused",) if name in refused_names else ())),
                per_sample(uses[name]),
                min(seconds.get(name, 0.0) for seconds in self.seconds),
            )
            for name, p in trial.trained.items()
            if name in book.entries
        )
        unused = tuple(name for name in trial.trained if name not in book.entries and name not in refused_names)
        return Coverage(covered, unused, refused, per_sample(book.uses))


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
    counts = Counter(
        use.function + (f" (derived: {' of '.join(use.derivation)})" if use.derivation else "") for use in uses
    )
    return tuple(f"{function} ×{count}" if count > 1 else function for function, count in counts.items())


def _methods(book: NotingBook, name: str, uses: Iterable[Use]) -> tuple[str, ...]:
    several = ("cross terms",) if len(book.entries[name]) > 1 else ()
    return (*dict.fromkeys(use.method for use in uses), *several)


def _tensors(use: Use) -> Iterator[Tensor]:
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
