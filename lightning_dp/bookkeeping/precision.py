"""The precision of norms and sums, whatever the model computes in.

Owns: what is stored in 16 bits made float32, and autocast switched off. A norm found in 16 bits is no bound: it may be
half a per cent too small, and a clipped gradient then exceeds the sensitivity by as much.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda")
_NOTHING = nullcontext()


def accurate(t: Tensor) -> Tensor:
    """Return ``t`` without its graph, in float32 if it is stored in 16 bits."""
    t = t.detach() if t.requires_grad else t
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def without_autocast() -> AbstractContextManager[Any]:
    """Compute in the precision of the tensors; under manual optimization a backward pass runs inside autocast."""
    enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not enabled:
        return _NOTHING
    stack = ExitStack()
    for device in enabled:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def autocast_now() -> Callable[[], list[AbstractContextManager[Any]]]:
    """Return the autocast state of the forward pass, as contexts to enter again in the backward pass."""
    states = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in _DEVICES
        if torch.is_autocast_enabled(device)
    ]
    return lambda: [torch.autocast(device, dtype, enabled, cache_enabled=False) for device, dtype, enabled in states]
