"""The peak of a process's memory.

Owns: where the figure comes from on each system. Does not own: when it is taken (``baton``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_dp.strategies.memory import give_back_freed

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """A peak, in bytes.

    Args:
        peak: The most that was held at a time.
        level: What was held before the model was built: the interpreter, torch and other imports. Zero on a GPU.
        source: Where the peak comes from.
    """

    peak: int
    level: int
    source: str

    @property
    def for_training(self) -> int:
        """Bytes of the peak that training takes: what lies above the level."""
        return self.peak - self.level


class PeakMemory:
    """Measures the memory of this process.

    On CUDA it is what torch's allocator has handed out at most since `reset`. On the CPU it is the largest resident
    set: since `reset` where Linux lets a process reset it, else since the process began.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._level = 0
        self._is_reset = False
        self.note_level()

    def note_level(self) -> None:
        """Take what is held now as what training does not take."""
        self._level = _of_status("VmRSS") or _max_resident()

    def reset(self, device: torch.device) -> None:
        """Begin to measure.

        Args:
            device: Where the training computes.
        """
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        give_back_freed()  # what the look before the first step took is no part of a later one
        try:
            _CLEAR.write_text("5")
            self._is_reset = True
        except OSError:  # another system, or a container that does not allow it
            self._is_reset = False

    def measured(self) -> Memory | None:
        """Return the peak; ``None`` on a system that does not tell."""
        if self._device.type == "cuda":
            return Memory(torch.cuda.max_memory_allocated(self._device), 0, "torch.cuda.max_memory_allocated")
        peak = _of_status("VmHWM")
        if peak and self._is_reset:
            return Memory(peak, self._level, "peak resident set (VmHWM), after the warm-up")
        peak = peak or _max_resident()
        return Memory(peak, self._level, "peak resident set, warm-up included") if peak else None


def _of_status(name: str) -> int:
    """Return bytes by their name in Linux's status of the process; 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _max_resident() -> int:
    """Return the largest resident set of the process in bytes; 0 where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
