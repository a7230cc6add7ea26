"""The meeting before every collective: processes see that they are about to do the same, and hear news of each other.

Owns: the few numbers that are exchanged. Does not own: the collectives that follow (``processes``), or what is made of
the news (``strategies``).

A sum of steps that are not the same one would have two draws in it, and a collective in the place of another would wait
without end. So each begins with one all-reduce of three numbers for each process: what it is about to do, what must be
equal there, and a note, such as a signal that only this process has received.
"""

from __future__ import annotations

import time
import zlib
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dp.errors import PrivacyError

_TAGS = 2**24
"""Numbers up to this are exact in float32."""

_FAILED = _TAGS
"""What a process does that does nothing any more."""

_PATIENCE = 5.0
"""Seconds that a process with an error waits for the others to hear of it."""

_TEXT = 400
"""Bytes that they hear."""

OTHER_STEPS = (
    "the processes do not make the same steps: a training step, a batch, an optimizer's step or the end of an epoch "
    "has come in some of them only, or in another order. What is skipped, or ends an epoch, must not depend on the "
    "rank or on the samples."
)


class Meeting:
    """What this process tells the others, and has heard of them.

    It has a process group of its own: the meeting of a process that has failed must never be taken for another
    collective, which would then end with a sum that is none.

    Args:
        device: Where collectives take place.
        timeout: How long to wait for other processes; ``None`` for the default of the backend.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None = None) -> None:
        self._rank, self._size, self._device = dist.get_rank(), dist.get_world_size(), device
        group = dist.new_group(timeout=timeout)
        assert isinstance(group, dist.ProcessGroup), "this process is in it, as all are"
        self._group = group
        self._notes: list[int] = []
        self._heard: list[int] = []
        self._is_over = False

    def check(self, what: str, equal: str = "", otherwise: str = OTHER_STEPS) -> None:
        """Check that all processes are about to do the same.

        Args:
            what: Says what this one is about to do.
            equal: Something else that must be the same everywhere.
            otherwise: Says what is wrong if that is not.

        Raises:
            PrivacyError: If they are not; if one has failed; in all of them.
        """
        note = self._notes[0] if self._notes else 0
        numbers = self._numbers(_tag(what), _tag(equal), note)
        dist.all_reduce(numbers, group=self._group)
        what_each, equal_each, notes = numbers.tolist()
        if _FAILED in what_each:
            self._raise(self._failures(None) or "it is not known how")
        if len(set(what_each)) > 1:
            self._raise(OTHER_STEPS)
        if len(set(equal_each)) > 1:
            self._raise(otherwise)
        if note:
            self._notes.remove(note)  # a signal may have added another one at the end
        self._heard += sorted({int(number) for number in notes if number} - {*self._heard})

    def note(self, number: int) -> None:
        """Let all processes, this one included, hear of a number at the next meeting; signal handlers may do this.

        Args:
            number: From 1 on, exact in float32.
        """
        if number not in self._notes:
            self._notes.append(number)

    def heard(self) -> list[int]:
        """Return the numbers noted by any process before the last meeting, the same in all; each is told once."""
        heard, self._heard = self._heard, []
        return heard

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error that ends this process, if they come to a meeting soon.

        Without it they would wait for this one: until its connection closes, or with NCCL until the timeout.
        """
        if self._is_over:
            return
        self._is_over = True
        with suppress(Exception):  # it is raised in any case; that nobody hears of it must not hide it
            if self._comes(self._numbers(_FAILED, 0, 0)):
                self._failures(error)

    def _raise(self, what: str) -> None:
        self._is_over = True  # all processes have heard of it
        raise PrivacyError(what)

    def _failures(self, error: BaseException | None) -> str:
        """Tell all processes of an error, if this one has one; return what is known of all."""
        text = "" if error is None else f"process {self._rank} has failed with {type(error).__name__}: {error}"
        written = text.encode()[:_TEXT]
        texts = torch.zeros(self._size, _TEXT, dtype=torch.uint8, device=self._device)
        texts[self._rank, : len(written)] = torch.tensor(list(written), dtype=torch.uint8, device=self._device)
        if not self._comes(texts):
            return ""
        return "; ".join(bytes(one).rstrip(b"\0").decode(errors="ignore") for one in texts.tolist() if any(one))

    def _comes(self, numbers: Tensor) -> bool:
        """Add up over all processes, if they come in time."""
        work, until = dist.all_reduce(numbers, group=self._group, async_op=True), time.monotonic() + _PATIENCE
        assert work is not None, "it is asynchronous"
        while not work.is_completed():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        work.wait()
        return True

    def _numbers(self, *mine: int) -> Tensor:
        numbers = torch.zeros(len(mine), self._size)
        numbers[:, self._rank] = torch.tensor(mine)
        return numbers.to(self._device)


def _tag(text: str) -> int:
    return zlib.crc32(text.encode()) % _TAGS
