"""Adding up many tensors over all processes, in few collectives.

Owns: how they are packed. Does not own: what is added up, or whether all processes add up the same (``processes``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET = 2**22
"""Elements that are added up at once: small tensors are packed up to this, larger ones go without a copy."""


def add_up(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Replace every tensor by its sum over all processes.

    Args:
        tensors: Contiguous, in the same order everywhere.
        device: Where collectives take place.
    """
    for bucket in _buckets(tensors):
        _add_up(bucket, device)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device, either packed up to the size of a bucket, or one large one alone."""
    packed: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        bucket = packed.setdefault(kind, [])
        if tensor.numel() >= _BUCKET:
            yield [tensor]
            continue
        if sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield packed.pop(kind)
            bucket = packed.setdefault(kind, [])
        bucket.append(tensor)
    yield from filter(None, packed.values())


def _add_up(bucket: list[Tensor], device: torch.device) -> None:
    """Add up the tensors of a bucket in place, in one collective."""
    one = bucket[0].view(-1) if len(bucket) == 1 else torch.cat([t.view(-1) for t in bucket])
    flat = one.to(device)
    dist.all_reduce(flat)
    if len(bucket) > 1 or flat is not one:
        for tensor, value in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.view(-1).copy_(value)
