"""What a caller of the book-keeping sees: observe a model once, then record one pass after the other.

Owns: the swap of the parameters' classes around each pass, and the check that no gradient escaped. Does not own: the
loss, the batches, clipping or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lightning_dp.bookkeeping.base import Keeping
from lightning_dp.bookkeeping.book import SPARE, Book
from lightning_dp.bookkeeping.costs import measure
from lightning_dp.bookkeeping.interception import (
    Anchor,
    Handler,
    check_swappable,
    intercepting,
    swapped,
    unswapped,
    without_interception,
)
from lightning_dp.bookkeeping.layout import Layouts
from lightning_dp.bookkeeping.observation import Forward, add, observe
from lightning_dp.bookkeeping.recorder import Recorder
from lightning_dp.bookkeeping.refusals import escaped
from lightning_dp.errors import UnsupportedModelError


class BookKeeping(Keeping):
    """Per-sample gradients of the trained parameters of any model, unmodified.

    Guarantee: after `close`, the book holds the exact gradient of every sample, or an error was raised. No parameter
    has a ``.grad``, and outside the ``with`` blocks nothing is left on the model.

    Args:
        trained: The parameters whose gradients are kept, by name.
        others: Further parameters that require a gradient but are not trained: they are treated as constants.

    Example:
        >>> keeping = BookKeeping(dict(model.named_parameters()))  # doctest: +SKIP
        >>> keeping.observe(lambda samples: loss_of(batch_of(samples)))  # doctest: +SKIP
        >>> with keeping.recording(num_samples=32):  # doctest: +SKIP
        ...     loss_of(batch).backward()
        >>> norm_sq = keeping.close().norm_sq()  # doctest: +SKIP
    """

    in_parts = False
    """Whether every process holds a part of the parameters."""

    coarse = False
    """Whether the model was seen to compute in 16 bits with parameters that are not."""

    def __init__(self, trained: Mapping[str, nn.Parameter], others: Mapping[str, nn.Parameter] | None = None) -> None:
        super().__init__(trained, others)
        every = {p: name for name, p in [*trained.items(), *(others or {}).items()][::-1]}  # shared ones once
        self._swapped = [(name, p) for p, name in reversed(every.items())]
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._classes: dict[type, type] = {}
        self._handler: Handler = _as_usual
        self._layouts, self._anchor = Layouts(), Anchor()
        self._recorder: Recorder | None = None

    def observe(self, forward: Forward, varied: bool = True, rows: int = 1, draws_elsewhere: bool = False) -> None:
        """Observe how the functions that the parameters enter use the samples; see ``observation``.

        Args:
            forward: Runs the forward pass on the samples named by a string: ``"aab"`` is a batch ``[a, a, b]``.
            varied: Whether ``a`` and ``b`` differ.
            rows: How many rows of a batch a sample is.
            draws_elsewhere: Whether it draws random numbers by Python or NumPy.
        """
        measure(self._trained.values())
        self._layouts = observe(self._names, self._swap, forward, varied, draws_elsewhere)
        self._layouts.fix(rows)

    def learn_from(self, other: BookKeeping) -> None:
        """Add what another book-keeping of the same parameters observed and this one did not."""
        add(self._layouts, other._layouts)

    @contextmanager
    def recording(self, num_samples: int | None = None) -> Iterator[None]:
        """Record what runs inside: the forward pass of ``num_samples`` samples, or its backward pass without it."""
        if num_samples is not None:
            self.abandon()
            self._recorder = self._new_recorder(num_samples)
        if self._recorder is None:
            raise RuntimeError("recording() without a number of samples continues a pass, and none was begun")
        with nullcontext() if self._is_recording() else self._swap(self._recorder.dispatch):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Give the parameters their own classes inside, in the middle of a recording: for a step of an optimizer."""
        if not self._is_recording():
            yield
            return
        handler, self._handler = self._handler, _as_usual
        try:
            with unswapped(self._swapped):
                yield
        finally:
            self._handler = handler

    def filed(self) -> set[str]:
        """Return the parameters for which gradients are in the book of the pass that is recorded."""
        if self._recorder is None:
            return set()
        self._recorder.carry()
        return set(self._recorder.book.entries)

    def take(self, names: Iterable[str]) -> Book:
        """Return what is in the book for these parameters, and go on with the pass.

        Between `recording` and `close`, for several backward passes through one forward pass.
        """
        if self._recorder is None:
            raise RuntimeError("take() needs a pass that is recorded, and none was begun")
        self._recorder.carry()
        return self._recorder.book.take(names)

    def close(self) -> Book:
        """End the pass and return its book.

        Raises:
            UnsupportedModelError: If autograd computed the gradient of a trained parameter past the book, or if no
                gradient came back at all.
        """
        if self._recorder is None:
            raise RuntimeError("close() ends a pass, and none was begun")
        recorder, self._recorder = self._recorder, None
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                parameter.grad = None
                raise self.escape_of(name)
        book = recorder.close()
        for name, entries in book.entries.items():
            shape = self._trained[name].shape
            for entry in entries:
                assert entry.shape == shape, f"a rule broke '{name}'"
        return book

    def abandon(self) -> None:
        """Drop an unfinished pass."""
        if self._recorder is not None:
            self._recorder.abandon()
        self._recorder = None

    def hold(self, name: str, whole: Tensor) -> Tensor:
        """Return what this process holds of a whole gradient of the parameter of this name."""
        return whole

    def add_up(self, numbers: list[float]) -> list[float]:
        """Add numbers up over all processes that hold parts."""
        return numbers

    def escape_of(self, name: str) -> UnsupportedModelError:
        """Return the error for a parameter whose gradient autograd computed past the book."""
        return escaped(name, self._layouts.where(name))

    def _new_recorder(self, num_samples: int) -> Recorder:
        recorder = Recorder(self._names, self._layouts, num_samples, self._is_recording, self._anchor)
        recorder.book.spare = self._spare
        return recorder

    @cached_property
    def _spare(self) -> int:
        """Elements that per-sample gradients may take.

        A fit with Adam holds four times its parameters: half of them is an eighth more.
        """
        return max(SPARE, sum(parameter.numel() for parameter in self._trained.values()) // 2)

    def _is_recording(self) -> bool:
        return self._handler is not _as_usual

    @contextmanager
    def _swap(self, handler: Handler) -> Iterator[None]:
        self._handler = handler
        try:
            with swapped(self._swapped, self._class_for) as swap, self._arriving(swap):
                yield
        finally:
            self._handler = _as_usual

    def _arriving(self, swap: Callable[[str, nn.Parameter], None]) -> AbstractContextManager[None]:
        """Return the context in which parameters are swapped that a pass brings forth."""
        return nullcontext()

    def _handle(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._handler(func, args, kwargs)

    def _class_for(self, name: str, base: type) -> type:
        if base not in self._classes:
            check_swappable(name, base)
            self._classes[base] = intercepting(base, self._handle)
        return self._classes[base]


def _as_usual(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function that came late, from a copy made while the class was swapped."""
    with without_interception():
        return func(*args, **kwargs)
