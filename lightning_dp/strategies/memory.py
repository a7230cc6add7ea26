"""How much memory there is, and how much of it something takes.

Owns: what CUDA's allocator, Linux and control groups tell. Does not own: how much of it may be used (``measuring``).
"""

from __future__ import annotations

import ctypes
import gc
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

_TOLD = re.compile(r"out of memory|allocate memory|ALLOC_FAILED", re.IGNORECASE)


class OutOfMemory(Exception):
    """Something that was tried did not fit into the memory; it was cleaned up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (is_oom_error(error) or _TOLD.search(str(error)) is not None)


def memory_of(device: torch.device) -> Memory | None:
    """Return the memory of a device, or ``None`` if this system does not tell how much of it is free."""
    if device.type == "cuda":
        return DeviceMemory(device)
    if device.type != "cpu":
        return None
    memory = HostMemory()
    try:
        memory.free()
        memory.peak_of(lambda: None)
    except (OSError, KeyError, ValueError):  # another system than Linux, or one that keeps this to itself
        return None
    return memory


class Memory(ABC):
    """The memory that batches and all that is computed of them lie in. All numbers are bytes."""

    @abstractmethod
    def free(self) -> int:
        """Return how much more of it this process could have now."""

    @abstractmethod
    def peak_of(self, action: Callable[[], object]) -> int:
        """Run an action, and return how much more than before was in use at its peak."""

    def clean_up(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()


class DeviceMemory(Memory):
    """The memory of a CUDA device. The peak that torch keeps of it begins anew with every measurement.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Return what the driver has, and what torch holds in reserve."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def peak_of(self, action: Callable[[], object]) -> int:
        """Run an action, and return what torch says of its tensors."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        action()
        return torch.cuda.max_memory_allocated(self._device) - before

    def clean_up(self) -> None:
        """Collect garbage, and give torch's reserve back to the driver."""
        garbage_collection_cuda()


class HostMemory(Memory):
    """The main memory, as Linux tells it, within the limits of the control groups that this process is in.

    Args:
        proc: Where the system tells about processes.
        groups: Where it tells about control groups.
    """

    def __init__(self, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc, self._groups = proc, groups

    def free(self) -> int:
        """Return what can be had without swapping, and without a control group ending the process."""
        return min([_kilobytes(self._proc / "meminfo", "MemAvailable"), *self._left_in_groups()])

    def peak_of(self, action: Callable[[], object]) -> int:
        """Run an action, and return what its pages came to."""
        give_back_freed()
        (self._proc / "self/clear_refs").write_text("5")  # the peak begins anew
        before = _kilobytes(self._proc / "self/status", "VmRSS")
        action()
        return max(0, _kilobytes(self._proc / "self/status", "VmHWM") - before)

    def clean_up(self) -> None:
        """Collect garbage, and give its pages back to the system."""
        super().clean_up()
        give_back_freed()

    def _left_in_groups(self) -> Iterator[int]:
        """Yield what is left of every limit, of both versions of control groups; files can be had again."""
        for line in _lines(self._proc / "self/cgroup"):
            _, controllers, name = line.split(":", 2)
            if controllers == "":
                yield from self._left(self._groups, name, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from self._left(self._groups / "memory", name, *files)

    def _left(self, root: Path, name: str, limit: str, usage: str, files: str) -> Iterator[int]:
        """Yield what is left in a group and in those around it; inside a container only some of them can be seen."""
        group = root / name.strip("/")
        for directory in (group, *group.parents):
            if directory == root.parent:
                return
            for most in _lines(directory / limit):
                if most != "max":
                    cached = [line.split()[1] for line in _lines(directory / "memory.stat") if line.split()[0] == files]
                    used = sum(map(int, _lines(directory / usage)))
                    yield int(most) - used + sum(map(int, cached))


_GIVING_BACK: dict[str, tuple[Any, ...]] = {
    "malloc_trim": (0,),  # the GNU library
    "MallocExtension_ReleaseFreeMemory": (),  # tcmalloc
    "mallctl": (b"arena.4096.purge", None, None, None, ctypes.c_size_t(0)),  # jemalloc: all arenas
}
"""What allocators call it, with its arguments."""


def give_back_freed() -> None:
    """Let the allocator return freed pages to the system: used again, they would not count towards a peak."""
    for name, arguments in _GIVING_BACK.items():
        with suppress(AttributeError, OSError, TypeError):  # another allocator, or another system
            getattr(ctypes.CDLL(None), name)(*arguments)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _kilobytes(path: Path, name: str) -> int:
    """Return a number of bytes that a file tells in kilobytes, as ``name: number kB``."""
    told = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(told[name].split()[0]) * 1024


def shown(num_bytes: float) -> str:
    """Return a number of bytes in words."""
    scale, unit = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / scale:.3g} {unit}" if num_bytes >= 1e6 else "under 1 MB"
