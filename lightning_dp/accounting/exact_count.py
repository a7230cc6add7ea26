"""The exact number of releases of a process, where it outlives the process and nothing else.

Owns: one small file for each process that keeps a journal, in the memory of the machine (``/dev/shm``). Does not own:
what is concluded from it (``journal``).

What a killed process handed to the kernel is still there; only a crash of the machine needs a disk. So this count is
written before every release, which takes microseconds. It is not kept beside the checkpoints on purpose: there it could
be copied or restored at another age than the journal, be lost on its way to a server or to a disk that is pulled out,
and be found on another machine. Memory can none of that: a count that can be read is the last one written.
"""

import os
import sys
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_dp.errors import PrivacyError

_MEMORY, _BOOT_ID = Path("/dev/shm"), Path("/proc/sys/kernel/random/boot_id")


class ExactCount:
    """The count of this process; it holds a lock on its file, which ends with the process.

    Guarantee: :func:`last_count` returns a number only if :meth:`write` was given it, and after that no other one; or
    ``None``, if anything speaks against that.

    Args:
        segment: The id of this process's segment in the ledger.
        handle: Its open and locked file.
        boot_id: Of the running system.
    """

    def __init__(self, segment: str, handle: int, boot_id: str) -> None:
        """Keep the file open until this object, or this process, ends."""
        self.segment, self._handle, self._boot_id = segment, handle, boot_id
        self._close = weakref.finalize(self, os.close, handle)
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
            boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            begun = cls(segment, handle, boot_id)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun.write(count)
        except (OSError, ValueError, PrivacyError):
            _remove(path)
            return None
        return begun

    def write(self, count: int) -> None:
        """Say that so many releases were made, before the last of them is.

        Args:
            count: All releases of this process.

        Raises:
            PrivacyError: If that cannot be written; the release must not be made then.
        """
        record = _record(self.segment, self._boot_id, count)
        try:
            written = os.pwrite(self._handle, record, 0)
        except OSError as error:
            raise _unwritable(self.segment, str(error)) from error
        if written != len(record):
            raise _unwritable(self.segment, f"{written} of {len(record)} bytes were written")

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
    except (OSError, ValueError, IndexError):
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
    boot_id, count = _BOOT_ID.read_text(encoding="ascii").strip(), int(found.split()[1])
    mine = os.fstat(handle).st_uid == os.getuid()
    return LastCount(count, is_final) if mine and found == _record(segment, boot_id, count) else None


def _path(segment: str) -> Path:
    """The file of one process."""
    return _MEMORY / f"lightning-dp-{segment}.count"


def _record(segment: str, boot_id: str, count: int) -> bytes:
    """A count as it is written: of one length, with a sum that shows whether it is whole and whose it is."""
    text = f"{boot_id} {count:020d}"
    return f"{text} {zlib.crc32((segment + text).encode()):08x}\n".encode()


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


def _unwritable(segment: str, why: str) -> PrivacyError:
    return PrivacyError(
        f"The number of releases cannot be written to {_path(segment)} ({why}). A release that is on no record could "
        "be forgotten after a crash: make room there."
    )


_OPEN: "weakref.WeakSet[ExactCount]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    """Close the files in a forked process, such as a dataloader's worker: else the lock would outlive their writer."""
    for count in list(_OPEN):
        with suppress(OSError):
            count._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
