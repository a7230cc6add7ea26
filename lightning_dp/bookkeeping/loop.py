"""Per-sample gradients without book-keeping: one backward pass of autograd for every sample.

Owns: the engine that is always right and always slow, for models with operations that torch does not let us see.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning_dp.bookkeeping.base import Keeping
from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.observation import Forward


class LoopKeeping(Keeping):
    """Takes the gradients that autograd computes for batches of one sample.

    Guarantee: exact for any model, since a sample is alone in its batch. Memory and time per sample are those of
    ordinary training with a batch of one.
    """

    _is_open = False

    def observe(self, forward: Forward, varied: bool = True, rows: int = 1) -> None:
        """Do nothing: there is nothing to know."""

    def recording(self, num_samples: int | None = None) -> AbstractContextManager[None]:
        """Run the pass as it is.

        Raises:
            ValueError: If it is one of more than one sample.
        """
        if num_samples is not None:
            self._drop()
            self._is_open = True
            if num_samples != 1:
                raise ValueError(f"a loop over the samples got a batch of {num_samples}; expected one")
        return nullcontext()

    def close(self) -> Book:
        """Return the gradients as a book of one sample."""
        book = Book(1)
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                book.file(name, Dense(parameter.grad.detach().clone()[None]))
        self.abandon()
        return book

    def abandon(self) -> None:
        """Drop the gradients of an unfinished pass."""
        if self._is_open:
            self._drop()
        self._is_open = False

    def _drop(self) -> None:
        for parameter in (*self._trained.values(), *self._others.values()):
            parameter.grad = None
