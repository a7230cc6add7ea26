"""Reservations: releases that are on disk before they are made, and how many of them at once.

Owns: what a journal file says, taking back what was not made, and the pace of writing. Does not own: files
(``journal``), nor the number that was made (``exact_count``).
"""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.releases import Release
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError


class Reservation:
    """A ledger's state with releases to come in it, all of one kind.

    Guarantee: whoever takes ``state`` for the history counts everything reserved, made or not.

    Args:
        segment: Which process's releases are reserved.
        state: As of :meth:`Ledger.state_dict`, with the releases to come.
        release: Their kind; ``None`` if nothing is reserved.
        ahead: How many there are.

    Raises:
        PrivacyError: If they are not in ``state``.
    """

    def __init__(self, segment: str, state: Mapping[str, Any], release: Release | None = None, ahead: int = 0) -> None:
        """Know the number of the last release that was made, and of the last one reserved."""
        self.segment, self.state, self.release, self.ahead = segment, state, release, ahead
        self.last = sum(row["num_releases"] for row in state["segments"].get(segment, []))
        self.first = self.last - ahead
        self._without(ahead)

    @classmethod
    def of(cls, ledger: Ledger, release: Release | None = None, ahead: int = 0) -> "Reservation":
        """Reserve releases on top of all that a ledger knows."""
        segment = ledger.own_segment
        return cls(segment, _changed(ledger.state_dict(), segment, release, ahead), release, ahead)

    def covers(self, number: int, release: Release) -> bool:
        """Whether the release of this number in the segment, from 1, is reserved and is to be this one."""
        return self.first < number <= self.last and (self.release is release or self.release == release)

    def made(self, number: int) -> "Reservation":
        """Take back what was not made.

        Args:
            number: How many releases the segment made in all.

        Returns:
            A reservation of nothing; or this one, if ``number`` does not belong to it.
        """
        if not self.first <= number <= self.last:
            return self
        return Reservation(self.segment, self._without(self.last - number))

    def text(self) -> str:
        """As it is kept in a file: a ledger's state, and beside it what of that is reserved only."""
        ahead = None if self.release is None else self.release.as_row(self.ahead)
        return json.dumps({**self.state, "own": self.segment, "ahead": ahead})

    @classmethod
    def parse(cls, text: str) -> "Reservation":
        """What :meth:`text` made.

        Raises:
            PrivacyError: If it is something else.
        """
        state: Any = json.loads(text)
        Ledger().merge(state)  # checks it
        own, ahead = state.pop("own", None), state.pop("ahead", False)
        if not isinstance(own, str) or ahead is False:
            raise PrivacyError("it does not say which releases are reserved only")
        try:
            return cls(own, state, *((None, 0) if ahead is None else Release.from_row(ahead)))
        except PrivacyConfigurationError as error:
            raise PrivacyError(f"what is reserved is no number of releases: {error}") from error

    def _without(self, unused: int) -> dict[str, Any]:
        """The state without so many of the releases reserved."""
        return _changed(self.state, self.segment, self.release, -unused)


def _changed(state: Mapping[str, Any], segment: str, release: Release | None, count: int) -> dict[str, Any]:
    """A state with so many releases more, or less, in one segment."""
    if release is None:
        return dict(state)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*state["segments"].get(segment, []), release.as_row(count)]:
        number = rows.get(_kind(row), row | {"num_releases": 0})["num_releases"] + row["num_releases"]
        rows[_kind(row)] = row | {"num_releases": number}
    if any(row["num_releases"] < 0 for row in rows.values()):
        raise PrivacyError("more is reserved than there is in all")
    return {**state, "segments": {**state["segments"], segment: list(rows.values())}}


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes the rows of two releases equal."""
    return tuple(row[name] for name in sorted(row) if name != "num_releases")


class Pace:
    """How many releases to reserve at once.

    Writing to a disk takes 0.5 to 20 milliseconds, to a network file system more, and a step may take as long. What is
    reserved and not made counts too much after a crash of the machine, which also loses every release since the last
    checkpoint: seconds more are not felt. So as little is reserved as keeps the writing under ``share`` of the time; on
    a slow disk not more than ``seconds`` of releases, or 1 % of those made if that is more. A block is at most twice
    the one before, so the first ones are small, whatever the first steps suggest.

    Args:
        share: Of the time.
        seconds: The longest a reservation is meant to last while 1 % of the releases are fewer.
    """

    def __init__(self, share: float = 0.001, seconds: float = 2.0) -> None:
        """Know nothing of disk and steps."""
        self._share, self._seconds = share, seconds
        self._began: float | None = None
        self._before, self._size, self._write, self._step = 0, 0, 0.0, float("inf")

    def block(self, made: int) -> int:
        """Return how many releases to reserve now.

        Args:
            made: How many this process has made.
        """
        if self._began is not None and made > self._before:
            self._step = (time.perf_counter() - self._began) / (made - self._before)
        most = max(self._seconds, 0.01 * made * self._step) if made else 0.0
        self._size = max(1, min(2 * self._size, math.ceil(min(self._write / self._share, most) / self._step)))
        return self._size

    def wrote(self, made: int, seconds: float) -> None:
        """Learn how long the writing took, all directories together; disks vary, so the mean of recent ones counts.

        Args:
            made: How many releases this process had made.
            seconds: The time.
        """
        self._write = (self._write + seconds) / 2 if self._write else seconds
        self._before, self._began = made, time.perf_counter()
