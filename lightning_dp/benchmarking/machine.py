"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import lightning
import torch


@dataclass(frozen=True)
class Machine:
    """What times depend on.

    Args:
        name: Of the machine in its network.
        processor: The CPU.
        cores: That this process may use.
        gpu: The GPU; ``None`` if the training was on the CPU.
        torch: Its version.
        lightning: Its version.
        python: Its version.
        date: When, in ISO 8601.
        preloaded: Libraries that are loaded before all others, such as another allocator; "" if there is none.
    """

    name: str
    processor: str
    cores: int
    gpu: str | None
    torch: str
    lightning: str
    python: str
    date: str
    preloaded: str = ""

    def __str__(self) -> str:
        """Return it in a line."""
        where = f"{self.processor}, {self.cores} cores" if self.gpu is None else f"{self.gpu} ({self.processor})"
        versions = f"torch {self.torch}, lightning {self.lightning}, Python {self.python}"
        return f"{where}; {versions}; {self.preloaded}{'; ' * bool(self.preloaded)}{self.date[:10]}"


def this_machine(device: str) -> Machine:
    """Return what this machine is.

    Args:
        device: The name of the device of the training, for torch.
    """
    is_cuda = torch.device(device).type == "cuda"
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        name=platform.node(),
        processor=_processor(),
        cores=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name(torch.device(device)) if is_cuda else None,
        torch=str(torch.__version__),
        lightning=lightning.__version__,
        python=platform.python_version(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preloaded=", ".join(os.path.basename(found) for found in re.split(r"[ :]+", os.environ.get("LD_PRELOAD", ""))),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
