"""The exact number of releases of a process, where it outlives the process and nothing else.

Owns: one small file for each process that keeps a journal, in the memory of the machine (``/dev/shm``). Does not own:
what is concluded from it (``journal``).

What a killed process stored in a mapped file is still there; only a crash of the machine needs a disk. So this count
is stored before every release, which takes a microsecond and no call of the system. It is not kept beside the
checkpoints on purpose: there it could be copied or restored at another age than the journal, be lost on its way to a
server or to a disk that is pulled out, and be found on another machine. Memory can none of that: a count that can be
read is the last one stored.

The file: the count, the count again, and whose it is. A process killed between the two stores leaves ``n, n - 1``.
"""

import mmap
import os
import struct
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

from lightning_dp.errors import PrivacyError

_COUNTS = struct.Struct("=QQ")
_MEMORY, _BOOT_ID = Path("/dev/shm"), Path("/proc/sys/kernel/random/boot_id")


class ExactCount:
    """The count of this process; it holds a lock on its file, which ends with the process.

    Guarantee: :func:`last_count` returns a number only if :meth:`write` was given it, and after that no other one; or
    ``None``, if anything speaks against that.

    Args:
        segment: The id of this process's segment in the ledger.
        handle: Its open and locked file, which holds the first record; the mapping keeps it open and locked.
    """

    def __init__(self, segment: str, handle: int) -> None:
        """Keep the file open until this object, or this process, ends."""
        self.segment = segment
        mapped = mmap.mmap(handle, 0)
        self._counts = memoryview(mapped)[: _COUNTS.size].cast("Q")
        self._close = weakref.finalize(self, _unmap, mapped, self._counts)
        _OPEN.add(self)

    @classmethod
    def begin(cls, segment: str, count: int) -> "ExactCount | None":
        """Begin to count, if this system can.

        Args:
            segment: The id of this process's segment in the ledger.
            count: The releases it has made.

        Returns:
            The count, or ``None`` without one; then there is no file either.

        Raises:
            PrivacyError: If there is a file that can neither be kept up nor removed.
        """
        if sys.platform != "linux":
            return None
        import fcntl

        path = _path(segment)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write_first(handle, _record(segment, count))
                return cls(segment, handle)
            finally:
                os.close(handle)
        except (OSError, ValueError):
            _remove(path)
            return None

    def write(self, count: int) -> None:
        """Say that so many releases were made, before the last of them is.

        Args:
            count: All releases of this process.

        Raises:
            PrivacyError: If the file is closed; the release must not be made then.
        """
        counts = self._counts
        try:
            counts[0] = count
            counts[1] = count
        except ValueError as error:
            raise PrivacyError(
                f"The number of releases cannot be stored in {_path(self.segment)} ({error}). A release that is on no "
                "record could be forgotten after a crash: begin a journal in this process."
            ) from error

    def remove(self) -> None:
        """Remove the file; the journals must be exact without it.

        Raises:
            PrivacyError: If it is still there.
        """
        _remove(_path(self.segment))
        self._close()


@dataclass(frozen=True)
class LastCount:
    """What a process wrote last.

    Args:
        count: How many releases it made, or the last of them was not made.
        is_final: Whether that process has ended.
    """

    count: int
    is_final: bool


def last_count(segment: str) -> LastCount | None:
    """Return what the process of a segment wrote last, if that is beyond doubt.

    Args:
        segment: Its id in the ledger.

    Returns:
        ``None`` without ``/dev/shm``, on another machine or after a restart, in another container, for another user,
        or if what is there is not what :meth:`ExactCount.write` writes.
    """
    if sys.platform != "linux" or not segment.isalnum():
        return None
    try:
        handle = os.open(_path(segment), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read(segment, handle)
    except (OSError, ValueError, struct.error):
        return None
    finally:
        os.close(handle)


def _read(segment: str, handle: int) -> LastCount | None:
    """Read a record; any error means that it is none."""
    import fcntl

    is_final = True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # before reading: nobody can write after it
    except BlockingIOError:
        is_final = False
    found = os.read(handle, 1000)
    count, again = _COUNTS.unpack(found[: _COUNTS.size])
    whole = count - again in (0, 1) and found == _record(segment, count, again)
    mine = os.fstat(handle).st_uid == os.getuid()
    return LastCount(count, is_final) if mine and whole else None


def _path(segment: str) -> Path:
    """The file of one process."""
    return _MEMORY / f"lightning-dp-{segment}.count"


def _record(segment: str, count: int, again: int | None = None) -> bytes:
    """The file of a process of this boot."""
    boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    return _COUNTS.pack(count, count if again is None else again) + f"{segment} {boot_id}\n".encode()


def _write_first(handle: int, record: bytes) -> None:
    """Write the first record in place of what is there; a store in what is written needs no room any more."""
    os.ftruncate(handle, 0)
    if os.pwrite(handle, record, 0) != len(record):
        raise OSError("the memory is full")


def _unmap(mapped: mmap.mmap, counts: memoryview) -> None:
    """Close the file, which gives up its lock."""
    counts.release()
    mapped.close()


def _remove(path: Path) -> None:
    """Remove a file that would otherwise be believed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if os.path.lexists(path):
            raise PrivacyError(
                f"{path} cannot be removed ({error}), and it would be taken for the number of releases of this "
                "process: remove it."
            ) from error


_OPEN: "weakref.WeakSet[ExactCount]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close the files in a forked process, such as a dataloader's worker: else the lock would outlive their writer."""
    for count in list(_OPEN):
        count._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
