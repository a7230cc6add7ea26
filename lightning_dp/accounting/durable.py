"""Durable files: at every instant the old or the new content, also after a crash of the machine.

Owns: how a small file is replaced. Does not own: what is in it.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
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
