"""A book-keeping that also notes how it goes: what enters which function, how norms are found, what is held meanwhile.

Owns: the notes of one pass. Does not own: the pass itself (``engine``, ``recorder``), or what is made of the notes.

A pass that notes does not stop at the first function it cannot do: it notes every refusal and goes on without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dp.bookkeeping.book import Book, Derived, Target
from lightning_dp.bookkeeping.call import Call
from lightning_dp.bookkeeping.engine import BookKeeping
from lightning_dp.bookkeeping.entries import Entry
from lightning_dp.bookkeeping.layout import Key, Layout, names_in
from lightning_dp.bookkeeping.operation import Recording
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.bookkeeping.recorder import Recorder
from lightning_dp.bookkeeping.rules.generic import MASKED, SLICED
from lightning_dp.errors import UnsupportedModelError

CARRIED_BACK = "materialised, carried back"
"""How the norm of a parameter is found that only enters through a function of parameters."""


@dataclass(eq=False)
class Use:
    """One entry of one parameter.

    Args:
        parameter: Its name.
        function: The torch function that the parameter, or something derived from it, entered.
        derivation: The functions of parameters alone that it went through before, the last one first.
        method: How the norm is found, in a few words.
        seconds: Time that was spent on the entry, norms and sums not included.
        entries: What is in the book for it.
        saved: What was saved for the backward pass on its account.
    """

    parameter: str
    function: str
    derivation: tuple[str, ...]
    method: str
    seconds: float
    entries: list[Entry]
    saved: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Refusal:
    """A use of parameters that has no exact per-sample gradient.

    Args:
        parameters: Their names.
        function: The torch function; empty where it is not known.
        where: The line of the user's code; empty where it is not known.
        reason: Why, and the way out.
    """

    parameters: tuple[str, ...]
    function: str
    where: str
    reason: str


class NotingBook(Book):
    """A book that notes where its entries come from.

    Args:
        num_samples: B.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self.uses: list[Use] = []
        self.refusals: list[Refusal] = []
        self._function, self._began = "", 0.0

    def recorded(self, call: Call, layout: Layout, recording: Recording) -> Recording:
        """Return a recording that does the same and is noted."""
        record, saved = recording
        name, key, num_saved = plain_name(call.name), call.key, len(saved)

        def noted(*tensors: Tensor) -> None:
            first, self._function, self._began = len(self.uses), name, now()
            try:
                record(*tensors)
            except UnsupportedModelError as error:
                self._refuse(key, layout, error)
            self._charge(self.uses[first:], tensors[len(tensors) - num_saved :])

        return noted, saved

    def file(self, target: Target, entry: Entry) -> None:
        """Add an entry, and note it."""
        super().file(target, entry)
        before, self._began = self._began, now()
        origins = list(_origins(target))
        for name, derivation in origins:
            filed = self.entries[name][-1] if _is_filed(target) else self.derived[-1][1]
            method = filed.method if _is_filed(target) else CARRIED_BACK
            self.uses.append(
                Use(name, self._function, derivation, method, (self._began - before) / len(origins), [filed])
            )

    def carry(self) -> None:
        """Carry the entries of derived tensors back; their time and memory belong to the uses that filed them."""
        carried = {id(entry) for _, entry in self.derived}
        waiting = [use for use in self.uses if any(id(entry) in carried for entry in use.entries)]
        filed = {name: list(entries) for name, entries in self.entries.items()}
        first, before = len(self.uses), now()
        super().carry()
        arrived = {use.parameter: use.entries for use in self.uses[first:]}
        del self.uses[first:]
        for use in waiting:
            use.seconds += (now() - before) / len(waiting)
            use.entries += arrived.get(use.parameter, [])
        for name, entries in self.entries.items():
            self._put_together(name, [*filed.get(name, []), *arrived.get(name, [])], entries)

    def _put_together(self, name: str, before: Sequence[Entry], now_held: Sequence[Entry]) -> None:
        """Note that the book holds other entries for a parameter than those that were filed."""
        fresh = [entry for entry in now_held if entry not in before]
        gone = [entry for entry in before if entry not in now_held]
        losing = [use for use in self.uses if use.parameter == name and any(entry in gone for entry in use.entries)]
        for use in losing:
            use.entries = [entry for entry in use.entries if entry not in gone]
            use.method = fresh[0].method if fresh else use.method
        if losing:
            losing[0].entries += fresh

    def _refuse(self, key: Key, layout: Layout, error: UnsupportedModelError) -> None:
        refusal = Refusal(names_in(key), plain_name(key[0]), layout.where, layout.reason or str(error))
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def _charge(self, uses: Sequence[Use], saved: Sequence[Tensor]) -> None:
        """Put what a function saved to the account of its largest parameter, which it was saved for."""
        if uses:
            largest = max(uses, key=lambda use: (math.prod(use.entries[0].shape), len(use.entries[0].shape)))
            largest.saved += saved
        together = [use for use in uses if use.method in (SLICED, MASKED)]  # found at once, filed one by one
        for use, seconds in zip(together, [sum(use.seconds for use in together)] * len(together), strict=True):
            use.seconds = seconds / len(together)


class NotingRecorder(Recorder):
    """The dispatch of one pass that is noted; arguments as for `Recorder`."""

    book: NotingBook

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.book = NotingBook(self.book.num_samples)

    def _recording(self, call: Call, layout: Layout, random_state: RandomState | None) -> Recording:
        return self.book.recorded(call, layout, super()._recording(call, layout, random_state))


class NotingKeeping(BookKeeping):
    """Book-keeping whose passes are noted; arguments as for `BookKeeping`."""

    noted: NotingBook
    """The book of the last pass."""

    def _new_recorder(self, num_samples: int) -> Recorder:
        recorder = NotingRecorder(self._names, self._layouts, num_samples, self._is_recording, self._anchor)
        self.noted = recorder.book
        return recorder

    def close(self) -> Book:
        """End the pass; a gradient past the book is noted as a refusal."""
        escapes = [name for name, parameter in self._trained.items() if parameter.grad is not None]
        for name in escapes:
            self._trained[name].grad = None
        book = super().close()
        self.noted.refusals += [Refusal((name,), "", "", str(self.escape_of(name))) for name in escapes]
        return book


def now() -> float:
    """Return the time, after all that was begun is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def plain_name(name: str) -> str:
    """Return a function's name without the underscores of a method: ``matmul`` for ``__matmul__``."""
    return name.strip("_")


def _origins(target: Target) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the parameters behind a target, each with the functions on its way there, the last one first."""
    if isinstance(target, str):
        yield target, ()
        return
    found = dict(_paths(target.identity))
    for name in target.roots:
        yield name, found.get(name, ())


def _paths(identity: Hashable) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(identity, tuple):
        name, parts = identity
        for part in parts:
            for parameter, path in _paths(part):
                yield parameter, (plain_name(name), *path)
    elif isinstance(identity, str):
        yield identity, ()


def _is_filed(target: Target) -> bool:
    """Whether an entry of this target goes into the book at once, rather than being carried back at the end."""
    while isinstance(target, Derived) and target.source is not None:
        target = target.source
    return isinstance(target, str)
