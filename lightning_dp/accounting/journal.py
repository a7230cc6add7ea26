"""The journal: a write-ahead record of releases beside the checkpoints.

Owns: when this process's file ``privacy-journal-<segment id>.json`` is written, in the directories that hold this run's
checkpoints. Does not own: the history itself (``ledger``), what a file says (``reservation``), the exact number
(``exact_count``), what is concluded after a crash (``recovery``), nor when a release is made (the private step).

A checkpoint knows the releases before it, not those between it and a crash; a run resumed from it would forget them.
So releases are reserved here before they are made, as in write-ahead logging (Mohan et al. 1992):
``releases on disk >= releases made``, at every instant. What was reserved and not made is taken back by whoever
resumes, if the exact number survived.
"""

import os
import time
from pathlib import Path
from typing import Any

from lightning_dp.accounting.durable import replace_file
from lightning_dp.accounting.exact_count import ExactCount
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phases import check_count
from lightning_dp.accounting.recovery import join_journals, journal_path, settle_journals
from lightning_dp.accounting.releases import Release
from lightning_dp.accounting.reservation import Pace, Reservation
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError


class Journal:
    """Keeps releases on disk before they are made, in every directory that holds a checkpoint of this run.

    Guarantee:
        If every release is preceded by :meth:`reserve`, a ledger loaded from any of this run's checkpoints and
        completed by :meth:`read` in that checkpoint's directory counts at least every release made, whenever the
        process died; provided that (1) the directory was added when the checkpoint was saved, (2) its file system keeps
        what was fsynced, (3) one journal writes for one ledger, (4) neither the directory nor the machine (a snapshot)
        is put back to an earlier time.

        What the reservation of a dead process counts, by what was left of it:

        ================================================= ============================================================
        case                                              effect
        ================================================= ============================================================
        killed, also while writing                        exact, or one more: the release that was about to be made
        ended without :meth:`close`                       exact
        the machine crashed or was restarted              in full: the exact number is gone with the memory
        resumed on another machine, in another container, in full: it is not there
        by another user, or not on Linux
        the process is still running                      in full: it may make them yet
        no memory was left for the number                 in full
        the number is torn, of another process or boot    in full
        the number is smaller than before the reservation in full
        directory or journal copied, restored, put back   `PrivacyError` if more was released than they know; on another
                                                          machine in full, and what is later than the copy is missing
        checkpoint copied without its journal             found where the checkpoint says it was saved, if that is there
        the same, and the journal is gone                 `PrivacyError` if a killed process released more; else, and
                                                          on another machine, only the checkpoint counts
        two processes resumed from one checkpoint         both count, for whoever resumes from that directory later
        directory deleted meanwhile                       skipped: its checkpoints are gone too
        disk full or read-only                            `PrivacyError` before the release
        forked process, copy of this object               keeps a record of its own
        ================================================= ============================================================
    """

    def __init__(self) -> None:
        """Know no directory yet."""
        self._directories: set[Path] = set()
        self._tidy: set[Path] = set()
        self._reserved: Reservation | None = None
        self._revision, self._written_by = 0, ""
        self._count: ExactCount | None = None
        self._pace = Pace()

    def add_directory(self, directory: str | os.PathLike[str]) -> None:
        """Record this run in ``directory`` from the next release on; call it whenever a checkpoint is saved there.

        Args:
            directory: An existing local directory.
        """
        path = Path(directory).absolute()
        if path not in self._directories:
            self._directories.add(path)
            self._reserved = None

    def reserve(self, ledger: Ledger, release: Release, *, block: int | None = None, cap: int | None = None) -> None:
        """Have the next release on disk, in every directory, before it is booked and made.

        Touches no disk while an earlier reservation covers that release.

        Args:
            ledger: The history, without the release to come.
            release: The one to come.
            block: How many releases to reserve at once, at least 1; ``None`` to go by time, see
                :class:`~lightning_dp.accounting.reservation.Pace`.
            cap: How many releases the budget still allows, at least 1; ``None`` for no limit.

        Raises:
            PrivacyConfigurationError: If ``block`` or ``cap`` is below 1.
            PrivacyError: If a file cannot be written; the release must not be made then.
        """
        for name, value in (("block", block), ("cap", cap)):
            if value is not None and (type(value) is not int or value < 1):
                _check_at_least_one(name, value)
        number, segment = ledger.num_own + 1, ledger.own_segment
        if self._directories and not self._covers(ledger, segment, number, release):
            ahead = self._pace.block(number - 1) if block is None else block
            self._reserve(Reservation.of(ledger, release, ahead if cap is None else min(ahead, cap)), ledger)
        if self._count is not None and self._count.segment == segment:
            self._count.write(number)

    def close(self, ledger: Ledger) -> None:
        """Replace reservations by what was really booked; call it at a clean end and on an exception.

        Args:
            ledger: The history with every release made.

        Raises:
            PrivacyError: If a file cannot be written; the reservations then stay, which is safe.
        """
        if self._written_by != ledger.own_segment:
            return  # nothing reserved, or by the process that this one was forked from
        self._reserved = None
        self._write(Reservation.of(ledger))
        if self._count is not None and self._count.segment == ledger.own_segment:
            self._count.remove()
            self._count = None
        self._written_by = ""

    @staticmethod
    def read(directory: str | os.PathLike[str], ledger: Ledger, *others: str | os.PathLike[str]) -> None:
        """Join into ``ledger`` every journal there that continues its history, through chains of resumes.

        Two histories belong together if they share a segment. This process's own file is left out: the ledger knows
        better than its own reservation.

        Args:
            directory: Where the checkpoint was loaded from; nothing happens if there is no such directory.
            ledger: The history as the checkpoint knew it.
            *others: Where else journals may be, such as where the checkpoint was copied from.

        Raises:
            PrivacyError: If a journal file cannot be read or is malformed; it names the file. If a process on this
                machine is known to have made more releases than are now in the ledger.
        """
        join_journals([Path(directory), *map(Path, others)], ledger)

    def _covers(self, ledger: Ledger, segment: str, number: int, release: Release) -> bool:
        """Whether the release is reserved, on top of the very history that the ledger has."""
        reserved = self._reserved
        if reserved is None or reserved.segment != segment or self._revision != ledger.revision:
            return False
        return reserved.covers(number, release)

    def _reserve(self, reservation: Reservation, ledger: Ledger) -> None:
        """Write a reservation, and only then believe in it."""
        self._reserved, self._written_by, began = None, reservation.segment, time.perf_counter()
        self._write(reservation)
        self._pace.wrote(reservation.first, time.perf_counter() - began)
        if self._count is None or self._count.segment != reservation.segment:
            self._count = ExactCount.begin(reservation.segment, reservation.first)
        self._reserved, self._revision = reservation, ledger.revision
        for directory in self._directories - self._tidy:
            settle_journals(directory, ledger)
        self._tidy = set(self._directories)

    def _write(self, reservation: Reservation) -> None:
        """Replace this process's journal in every directory that is still there."""
        self._directories = {directory for directory in self._directories if directory.is_dir()}
        for path in sorted(journal_path(directory, reservation.segment) for directory in self._directories):
            try:
                replace_file(path, reservation.text())
            except OSError as error:
                raise PrivacyError(
                    f"The privacy journal {path} cannot be written ({error}). A release that is on no record could be "
                    "forgotten after a crash: make room or make the directory writable."
                ) from error

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes with a copy of the ledger, which has a segment of its own: it reserves anew."""
        return {**Journal().__dict__, "_directories": set(self._directories)}


def _check_at_least_one(name: str, value: int) -> None:
    """Raise if this is no positive count."""
    if check_count(name, value) < 1:
        raise PrivacyConfigurationError(f"{name}={value!r}: expected an integer >= 1.")
