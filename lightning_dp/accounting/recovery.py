"""Recovery: what the journals in a directory tell a run that is resumed from there.

Owns: the names of journal files, reading them, and what is concluded from them and the exact numbers. Does not own:
writing this process's own (``journal``), nor what a file says (``reservation``).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_dp.accounting.durable import replace_file
from lightning_dp.accounting.exact_count import LastCount, last_count
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.reservation import Reservation
from lightning_dp.errors import PrivacyError

_PREFIX, _SUFFIX = "privacy-journal-", ".json"


def journal_path(directory: Path, segment: str) -> Path:
    """The journal file of one process."""
    return directory / f"{_PREFIX}{segment}{_SUFFIX}"


def journal_places(path: Path, state: Mapping[str, Any]) -> list[Path]:
    """Return where journals are that may continue a checkpoint: beside it, and where it was before it was copied.

    Args:
        path: Its file; of a link also what it leads to.
        state: What this library put into it.
    """
    earlier = [Path(state["directory"])] if state.get("directory") else []
    places: dict[Path, Path] = {}
    for place in (path.parent, path.resolve().parent, *earlier):
        places.setdefault(place.resolve(), place)
    return list(places.values())


def join_journals(directories: Sequence[Path], ledger: Ledger) -> None:
    """Join every journal in some directories that continues a history: see :meth:`Journal.read`."""
    found = [_Found(path) for place in directories for path in _journals(place, but=ledger.own_segment)]
    known = {one.segment: one.last for one in found}
    joined = True
    while joined:
        related = [one for one in found if one.reservation.state["segments"].keys() & ledger.segment_ids]
        found = [one for one in found if one not in related]
        for one in related:
            ledger.merge(one.settled.state)
        joined = bool(related)
    _check_complete(directories[0], ledger, known)


def settle_journals(directory: Path, ledger: Ledger) -> None:
    """Settle the reservations of processes that have ended, for the time after a restart; it may be left undone."""
    for path in _journals(directory, but=ledger.own_segment):
        with suppress(OSError, PrivacyError):
            found = _Found(path)
            settled = found.settled
            if settled is not found.reservation and found.segment in ledger.segment_ids:
                replace_file(path, settled.text())


class _Found:
    """A journal in a directory: what it reserves, and what is known of its process.

    The number is read before the file, which is thus at least as new, unless it was put there from elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.segment = path.name[len(_PREFIX) : -len(_SUFFIX)]
        self.last = last_count(self.segment)
        self.reservation = _load(path)

    @property
    def settled(self) -> Reservation:
        """What of the reservation counts: what was made, if that is known and final; else all."""
        last, mine = self.last, self.segment == self.reservation.segment
        return self.reservation.made(last.count) if last is not None and last.is_final and mine else self.reservation


def _journals(directory: Path, but: str) -> list[Path]:
    """The journals of other processes in a directory."""
    return sorted(set(directory.glob(f"{_PREFIX}*{_SUFFIX}")) - {journal_path(directory, but)})


def _load(path: Path) -> Reservation:
    """The checked content of one journal file."""
    try:
        return Reservation.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, PrivacyError) as error:
        raise PrivacyError(
            f"The privacy journal {path} cannot be read ({error}). It may hold releases that no checkpoint knows, so "
            "it is not ignored: restore it, or remove it if this run did not write it."
        ) from error


def _check_complete(directory: Path, ledger: Ledger, known: Mapping[str, LastCount | None]) -> None:
    """Raise if a process of this history made more releases than the ledger knows."""
    for segment in sorted(ledger.segment_ids - {ledger.own_segment}):
        last = known[segment] if segment in known else last_count(segment)
        if last is not None and last.count > ledger.num_of(segment):
            name = journal_path(directory, segment).name
            raise PrivacyError(
                f"{last.count} releases were made where {directory} knows of {ledger.num_of(segment)}: {name} is not "
                "there or is an older copy. Resume from the directory where that run kept it, or copy it from there "
                "when that run has ended."
            )
