"""What this process holds of a model that FSDP2 shards over several, and that it holds no more than that.

Owns: what also has an answer for any other model. Does not own: the shards (``lightning_dp.shards``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()
def held(t: Tensor) -> Tensor:
    """Return the part of a tensor that is in the memory of this process."""
    return t.to_local() if isinstance(t, DTensor) else t


def units(module: nn.Module) -> list[Any]:
    """Return the modules that were given to ``fully_shard``."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Let a module hold its shards only: after a forward pass without a backward pass some parameters are whole."""
    for unit in units(module):
        unit.reshard()
