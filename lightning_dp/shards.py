"""How a parameter lies over the processes under FSDP2, and how what every process has in full is brought there.

Owns: cutting into shards, and adding up sums of all processes shard by shard. Does not own: the sums (``sums``), the
gathered parameters (``bookkeeping.sharded``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_dp.errors import PrivacyConfigurationError


class ShardOf:
    """The part of one parameter that this process holds: rows ``rank * size`` up to the next ones, along one axis.

    Args:
        name: The parameter's name.
        parameter: The parameter.

    Raises:
        PrivacyConfigurationError: If it is not cut along one axis over all processes, in their order.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        if not isinstance(parameter, DTensor):
            raise PrivacyConfigurationError(
                f"parameter '{name}' of shape {tuple(parameter.shape)} is trained and not sharded, so no process would "
                "have the gradients of the others for it. In configure_model(), call fully_shard(module, "
                "mesh=self.device_mesh['data_parallel']) on a module that holds it, or freeze it."
            )
        mesh, placements = parameter.device_mesh, parameter.placements
        everyone = list(range(dist.get_world_size()))
        if mesh.mesh.tolist() != everyone or [type(p) for p in placements] != [Shard]:
            raise PrivacyConfigurationError(
                f"parameter '{name}' lies on a mesh of shape {tuple(mesh.shape)} as {placements}: expected one cut "
                f"over all {len(everyone)} processes. With tensor parallelism, or replicas of shards, norms and noise "
                "would be those of parts. Use fully_shard(module, mesh=self.device_mesh['data_parallel']) alone."
            )
        self._parameter, self._count, self._rank = parameter, len(everyone), mesh.get_local_rank()
        self._axis: int = placements[0].dim  # type: ignore[attr-defined]
        self._rows = parameter.shape[self._axis]
        self._most = math.ceil(self._rows / self._count)
        self._rest = [size for k, size in enumerate(parameter.shape) if k != self._axis]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self._parameter.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The type that sums have."""
        return torch.promote_types(self._parameter.dtype, torch.float32)

    def zeros(self) -> Tensor:
        """Return zeros for the whole parameter."""
        return torch.zeros(self._parameter.shape, dtype=self.dtype, device=self._parameter.device)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the rows of all processes, each as many as the first one has, shape ``[processes, elements]``."""
        rows = whole.to(self.dtype).movedim(self._axis, 0)
        missing = self._most * self._count - self._rows
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return rows.reshape(self._count, -1)

    def own(self, cut: Tensor) -> Tensor:
        """Return this process's shard of what `cut` returned for it, as a tensor of its own."""
        begin = self._rank * self._most
        rows = cut.view(self._most, *self._rest)[: max(0, min(self._most, self._rows - begin))]
        return rows.movedim(0, self._axis).clone(memory_format=torch.contiguous_format)

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's shard of what all processes have alike."""
        return self.own(self.cut(whole)[self._rank])

    def write(self, shard: Tensor) -> None:
        """Make a shard the gradient of the parameter."""
        parameter = self._parameter
        assert isinstance(parameter, DTensor)
        parameter.grad = DTensor.from_local(
            shard.to(parameter.dtype),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def add_up(wholes: Mapping[str, Tensor], shards: Mapping[str, ShardOf]) -> dict[str, Tensor]:
    """Add up over all processes, in one collective, and return what is this process's of the sums.

    Args:
        wholes: Of equal types, in the same order everywhere.
        shards: Those of the parameters.
    """
    pieces = [shards[name].cut(whole) for name, whole in wholes.items()]
    mine = _reduce_scatter(pieces)
    lengths = [piece.shape[1] for piece in pieces]
    return {name: shards[name].own(part) for name, part in zip(wholes, mine.split(lengths), strict=True)}


def _reduce_scatter(pieces: Sequence[Tensor]) -> Tensor:
    packed = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)
    mine = packed.new_empty(packed.shape[1])
    dist.reduce_scatter_tensor(mine, packed.contiguous().view(-1))
    return mine
