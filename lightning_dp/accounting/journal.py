"""The journal: a write-ahead record of releases beside the checkpoints.

Owns: files ``privacy-journal-<segment id>.json`` in the directories that hold this run's checkpoints. Does not own:
the history itself (``ledger``), nor when a release is made (the private step).

A checkpoint knows the releases before it, not those between it and a crash; a run resumed from it would forget them.
So releases are reserved here before they are made, as in write-ahead logging (Mohan et al. 1992):
``releases on disk >= releases made``, at every instant, at the price of at most one block too many after a crash.
"""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phases import check_count
from lightning_dp.accounting.releases import Release
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError

_PREFIX, _SUFFIX = "privacy-journal-", ".json"


class Journal:
    """Keeps releases on disk before they are made, in every directory that holds a checkpoint of this run.

    Guarantee:
        If every release is preceded by :meth:`reserve`, a ledger loaded from any of this run's checkpoints and
        completed by :meth:`read` in that checkpoint's directory counts at least every release made, whenever the
        process died; provided that (1) the directory was added when the checkpoint was saved, (2) its file system keeps
        what was fsynced, (3) one process writes for one ledger.

        ========================================== ===================================================
        case                                       effect
        ========================================== ===================================================
        killed while writing                       the previous record stays, and still covers all
        killed between reservation and release     up to one block is counted too much, never too little
        checkpoint moved without its journal       only the checkpoint counts
        directory deleted meanwhile                skipped: its checkpoints are gone too
        ========================================== ===================================================
    """

    def __init__(self) -> None:
        """Know no directory yet."""
        self._directories: set[Path] = set()
        self._written: dict[Path, dict[str, Any]] = {}

    def add_directory(self, directory: str | os.PathLike[str]) -> None:
        """Record this run in ``directory`` from the next release on; call it whenever a checkpoint is saved there.

        Args:
            directory: An existing local directory.
        """
        self._directories.add(Path(directory).absolute())

    def reserve(self, ledger: Ledger, release: Release, *, block: int = 1, cap: int | None = None) -> None:
        """Have the next release on disk, in every directory, before it is booked and made.

        Touches no disk while an earlier reservation covers that release.

        Args:
            ledger: The history, without the release to come.
            release: The one to come.
            block: How many releases to reserve at once, at least 1; about 1 % of the planned steps.
            cap: How many releases of this kind the budget still allows, at least 1; ``None`` for no limit.

        Raises:
            PrivacyConfigurationError: If ``block`` or ``cap`` is below 1.
            PrivacyError: If a file cannot be written; the release must not be made then.
        """
        ahead = _at_least_one("block", block)
        if cap is not None:
            ahead = min(ahead, _at_least_one("cap", cap))
        needed = _extended(ledger, release, 1)
        for directory in sorted(self._directories):
            if not _covers(self._written.get(directory), needed):
                state = _extended(ledger, release, ahead)
                self._write(directory, ledger.own_segment, state)

    def close(self, ledger: Ledger) -> None:
        """Replace reservations by what was really booked; call it at a clean end and on an exception.

        Args:
            ledger: The history with every release made.

        Raises:
            PrivacyError: If a file cannot be written; the reservations then stay, which is safe.
        """
        for directory in sorted(self._written):
            self._write(directory, ledger.own_segment, ledger.state_dict())

    @staticmethod
    def read(directory: str | os.PathLike[str], ledger: Ledger) -> None:
        """Join into ``ledger`` every journal in ``directory`` that continues its history, through chains of resumes.

        Two histories belong together if they share a segment. This process's own file is left out: the ledger knows
        better than its own reservation.

        Args:
            directory: Where the checkpoint was loaded from; nothing happens if there is no such directory.
            ledger: The history as the checkpoint knew it.

        Raises:
            PrivacyError: If a journal file cannot be read or is malformed; it names the file.
        """
        own = _path(Path(directory), ledger.own_segment)
        waiting = [_load(path) for path in sorted(Path(directory).glob(f"{_PREFIX}*{_SUFFIX}")) if path != own]
        joined = True
        while joined:
            related = [state for state in waiting if state["segments"].keys() & ledger.segment_ids]
            waiting = [state for state in waiting if state not in related]
            for state in related:
                ledger.merge(state)
            joined = bool(related)

    def _write(self, directory: Path, segment: str, state: dict[str, Any]) -> None:
        """Replace the journal in one directory, if the directory is still there."""
        if not directory.is_dir():
            self._directories.discard(directory)
            self._written.pop(directory, None)
            return
        path = _path(directory, segment)
        try:
            _replace(path, json.dumps(state))
        except OSError as error:
            raise PrivacyError(
                f"The privacy journal {path} cannot be written ({error}). A release that is on no record could be "
                "forgotten after a crash: make room or make the directory writable."
            ) from error
        self._written[directory] = state


def _path(directory: Path, segment: str) -> Path:
    """The journal file of one process."""
    return directory / f"{_PREFIX}{segment}{_SUFFIX}"


def _at_least_one(name: str, value: int) -> int:
    """A positive count."""
    if check_count(name, value) < 1:
        raise PrivacyConfigurationError(f"{name}={value!r}: expected an integer >= 1.")
    return int(value)


def _extended(ledger: Ledger, release: Release, count: int) -> dict[str, Any]:
    """The ledger's state as if this process had made so many releases more."""
    state = ledger.state_dict()
    rows = state["segments"][ledger.own_segment]
    row = next((row for row in rows if Release.from_row(row)[0] == release), None)
    if row is None:
        rows.append(release.as_row(count))
    else:
        row["num_releases"] += count
    return state


def _counts(state: dict[str, Any]) -> dict[tuple[str, Release], int]:
    """The releases by process and kind."""
    rows = ((name, Release.from_row(row)) for name, rows in state["segments"].items() for row in rows)
    return {(name, release): count for name, (release, count) in rows}


def _covers(written: dict[str, Any] | None, needed: dict[str, Any]) -> bool:
    """Whether a written state has every process (the links to earlier runs) and every release of a needed one."""
    if written is None or not written["segments"].keys() >= needed["segments"].keys():
        return False
    have = _counts(written)
    return all(have.get(key, 0) >= count for key, count in _counts(needed).items())


def _load(path: Path) -> dict[str, Any]:
    """The checked state in one journal file."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Ledger().merge(state)
    except (OSError, ValueError, PrivacyError) as error:
        raise PrivacyError(
            f"The privacy journal {path} cannot be read ({error}). It may hold releases that no checkpoint knows, so "
            "it is not ignored: restore it, or remove it if this run did not write it."
        ) from error
    return state


def _replace(path: Path, text: str) -> None:
    """Write a file so that at every instant the old or the new content is there, and the new one after return."""
    handle, temporary = tempfile.mkstemp(prefix=".privacy-journal-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make the renaming itself durable, where the system can open a directory."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
