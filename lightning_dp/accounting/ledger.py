"""The ledger: every release ever made by a run, through checkpoints, resumes and crashes.

Owns: the history of releases and its serialisation. Does not own: epsilon (``base``), files (``journal``).

A ledger is a grow-only counter (Shapiro et al. 2011, specification 6): one segment per process that makes releases,
only ever extended by that process, and two histories join by the greater count,
``join(a, b)[segment, release] = max(a[segment, release], b[segment, release])``, so that no order of loading loses a
release.
"""

import os
import uuid
from collections.abc import Mapping
from typing import Any

from lightning_dp.accounting.phases import Phase, merge_phases
from lightning_dp.accounting.releases import Release, histories
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError

_VERSION = 2

Segment = dict[Release, int]


class Ledger:
    """An append-only history of releases.

    Guarantee:
        ``num_releases`` never decreases, and ``phases`` covers every release booked here or in any merged state.

        ================================== ==============================================
        case                               effect
        ================================== ==============================================
        an older checkpoint is merged      nothing is lost: the greater count stays
        a checkpoint in a fresh process    its releases count, new ones are added to them
        the same state merged twice        counts once
        a copy, a pickle, a forked process goes on in a segment of its own
        ================================== ==============================================
    """

    def __init__(self) -> None:
        """Start an empty history."""
        self._segments: dict[str, Segment] = {}
        self._own: tuple[int, str] | None = None
        self._num_own, self._num_others, self._revision = 0, 0, 0

    @property
    def own_segment(self) -> str:
        """The random id of this process's segment, drawn when first needed."""
        # A forked process must not extend its parent's segment: of two histories of one id only the greater counts.
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), uuid.uuid4().hex
            self._segments[self._own[1]] = {}
            self._recount()
        return self._own[1]

    def continue_as(self, segment: str) -> None:
        """Extend the segment of the first of several processes that make every release together.

        They book the same releases, and a release counts once: so they have one segment, and one of them writes it.

        Args:
            segment: Of that process: its `own_segment`.
        """
        before = self.own_segment
        if segment == before:
            return
        if not self._segments[before]:
            del self._segments[before]
        self._own = os.getpid(), segment
        self._segments.setdefault(segment, {})
        self._recount()

    @property
    def segment_ids(self) -> frozenset[str]:
        """The ids of all processes that took part in this history."""
        return frozenset(self._segments)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All releases, one phase for each distinct noise and rate."""
        return merge_phases(release.times(count) for release, count in self.counts.items())

    @property
    def counts(self) -> dict[Release, int]:
        """How many releases of each kind there were, in order of first appearance."""
        counts: dict[Release, int] = {}
        for segment in self._segments.values():
            for release, count in segment.items():
                counts[release] = counts.get(release, 0) + count
        return counts

    def histories(self, more: Mapping[Release, int] | None = None) -> tuple[tuple[Phase, ...], ...]:
        """What a unit can have taken part in: see :func:`~lightning_dp.accounting.releases.histories`.

        Args:
            more: Releases to come, which are counted too.
        """
        return histories(self.counts, more or {})

    def concerning(self, more: Mapping[Release, int]) -> tuple[tuple[Phase, ...], ...]:
        """What units can have taken part in that releases to come concern; those of other partitions are left out.

        Args:
            more: Releases to come, which are counted too.
        """
        named = {release.partition for release in more}
        made = {r: n for r, n in self.counts.items() if None in named or r.partition in (None, *named)}
        return histories(made, more)

    @property
    def num_releases(self) -> int:
        """The number of all releases."""
        return self._num_own + self._num_others

    @property
    def num_own(self) -> int:
        """The number of releases in this process's segment."""
        _ = self.own_segment  # a forked process begins anew
        return self._num_own

    @property
    def revision(self) -> int:
        """Grows whenever another history is joined, not when a release is booked."""
        return self._revision

    def num_of(self, segment: str) -> int:
        """The number of releases in one segment; 0 if it took no part."""
        return sum(self._segments.get(segment, {}).values())

    def book(self, release: Release) -> None:
        """Enter one release, before it is made."""
        own = self._segments[self.own_segment]
        own[release] = own.get(release, 0) + 1
        self._num_own += 1

    def state_dict(self) -> dict[str, Any]:
        """The history as plain values that JSON keeps.

        This process's segment is there even before its first release, so that a journal written later is recognised
        as the continuation of this very state.
        """
        self._segments.setdefault(self.own_segment, {})
        segments = {
            name: [release.as_row(count) for release, count in segment.items()]
            for name, segment in self._segments.items()
        }
        return {"version": _VERSION, "segments": segments}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Join a history from :meth:`state_dict`; every count becomes the greater of both.

        Args:
            state: What ``state_dict`` returned, here or in another process.

        Raises:
            PrivacyError: If ``state`` is of another version or malformed; the ledger is then unchanged.
        """
        for name, loaded in _parse(state).items():
            segment = self._segments.setdefault(name, {})
            for release, count in loaded.items():
                segment[release] = max(count, segment.get(release, 0))
        own = self._own[1] if self._own is not None else ""
        if own in self._segments and not self._segments[own]:
            self._segments[own] = self._segments.pop(own)  # what it is going to release comes last
        self._recount()

    def _recount(self) -> None:
        """Add up anew what every step asks for and only the own segment's growth changes step by step."""
        own = self._own[1] if self._own is not None else ""
        self._num_own = self.num_of(own)
        self._num_others = sum(map(self.num_of, self._segments)) - self._num_own
        self._revision += 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the history, but not the right to extend this process's segment."""
        segments = {name: dict(segment) for name, segment in self._segments.items()}
        totals = {"_num_own": 0, "_num_others": self.num_releases, "_revision": self._revision}
        return {"_segments": segments, "_own": None, **totals}


def _parse(state: Mapping[str, Any]) -> dict[str, Segment]:
    """The segments of a state, or an error that says what is wrong with it."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise PrivacyError(f"This is no privacy ledger: {_shown(state)} has no 'version'.")
    if state["version"] != _VERSION:
        raise PrivacyError(
            f"The privacy ledger is of version {_shown(state['version'])}; this library reads version {_VERSION}. "
            "Load it with the library that wrote it."
        )
    segments = state.get("segments")
    if not isinstance(segments, Mapping):
        raise PrivacyError(f"The privacy ledger is malformed: segments={_shown(segments)}, expected a mapping.")
    return {_parse_name(name): _parse_segment(name, rows) for name, rows in segments.items()}


def _parse_name(name: object) -> str:
    """A segment id."""
    if not isinstance(name, str) or not name:
        raise PrivacyError(f"The privacy ledger is malformed: segment id {_shown(name)}, expected a string.")
    return name


def _parse_segment(name: str, rows: object) -> Segment:
    """One segment: a list of rows of :class:`Release`."""
    segment: Segment = {}
    try:
        for release, count in map(Release.from_row, rows):  # type: ignore[call-overload]
            segment[release] = segment.get(release, 0) + count
    except (TypeError, PrivacyConfigurationError) as error:
        raise PrivacyError(
            f"The privacy ledger is malformed: segment {name!r} is {_shown(rows)}, expected a list of releases with "
            f"their number ({error})"
        ) from error
    return segment


def _shown(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
