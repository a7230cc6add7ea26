"""`DPFSDPStrategy`: several devices that share the model out, by PyTorch's FSDP2.

Owns: what of it is not done privately yet, and is refused. Does not own: the arguments (``arguments``), the private
steps (``hooks``), gathered parameters (``bookkeeping.sharded``) or sums in shards (``sharded_sums``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.tensor import DTensor

from lightning_dp.bookkeeping.held import reshard
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.shards import ShardOf
from lightning_dp.strategies import checks
from lightning_dp.strategies.arguments import PrivateStrategy, Starting
from lightning_dp.strategies.preparing import Prepared
from lightning_dp.strategies.public_steps import PublicSteps

S = TypeVar("S", bound="DPFSDPStrategy")


class DPFSDPStrategy(PrivateStrategy, ModelParallelStrategy):
    """Trains a model with differential privacy whose parameters are sharded over the processes.

    For models that do not fit into one device. In ``configure_model`` the module calls ``fully_shard`` on its parts and
    on the whole, as under Lightning's ``ModelParallelStrategy``, with ``mesh=self.device_mesh["data_parallel"]``.

    Guarantee: that of `DPStrategy`. Each process clips the gradients of its own samples, over all parameters; the
    clipped sums are added up shard by shard in 32 bits, and each process adds independent noise to its own shards.

    Args:
        save_distributed_checkpoint: Whether every process saves its own shards, into a directory; otherwise the first
            one saves the whole state into one file.
        **arguments: Those of `DPStrategy`, save what is refused below.

    Raises:
        PrivacyConfigurationError: If an argument is out of range or not available with sharded parameters:
            ``clipping_engine="loop"``, ``max_physical_batch_size="auto"``, another ``start_method`` than ``"popen"``.

    Example:
        >>> def configure_model(self):  # a method of the LightningModule
        ...     mesh = self.device_mesh["data_parallel"]
        ...     for block in self.model.blocks:
        ...         fully_shard(block, mesh=mesh)
        ...     fully_shard(self.model, mesh=mesh)
        >>> trainer = pl.Trainer(devices=4, strategy=DPFSDPStrategy(target_epsilon=3.0))  # doctest: +SKIP
    """

    strategy_name = "dp_fsdp"

    def __init__(self, *, save_distributed_checkpoint: bool = True, **arguments: Any) -> None:
        self._saves_shards = save_distributed_checkpoint
        super().__init__(**arguments)
        _check_settings(self._run.settings.clipping_engine, self._run.settings.max_physical_batch_size)

    def _begin_processes(self, starting: Starting) -> None:
        if starting.start_method != "popen":
            raise PrivacyConfigurationError(
                f"start_method={starting.start_method!r}: expected 'popen'. Lightning starts the processes of sharded "
                "models by running the script once more for each; or start them by torchrun or SLURM."
            )
        ModelParallelStrategy.__init__(
            self,
            save_distributed_checkpoint=self._saves_shards,
            process_group_backend=starting.process_group_backend,
            timeout=starting.timeout,
        )

    def successor(self: S, **changes: Any) -> S:
        """Return a strategy for another trainer that goes on with this run."""
        return super().successor(**{"save_distributed_checkpoint": self._saves_shards, **changes})

    def mix_public(self, public: PublicSteps | None) -> None:
        """Refuse public steps.

        Raises:
            PrivacyConfigurationError: If there are some.
        """
        if public is not None:
            raise PrivacyConfigurationError(
                "DPFSDPStrategy has no steps on public data: gradients of another loss would be reduced by FSDP while "
                "those of private samples are not. Pretrain by a Trainer with ModelParallelStrategy, then train "
                "privately from its checkpoint."
            )
        super().mix_public(public)

    def setup_environment(self) -> None:
        """Find the other processes; all of them share out the data."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _setup_plainly(self, trainer: pl.Trainer) -> None:
        ModelParallelStrategy.setup(self, trainer)
        whole = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        self._run.processes.share({name: t for name, t in whole.items() if not isinstance(t, DTensor)})
        if trainer.state.fn == TrainerFn.FITTING:
            _check_fit(self._module, checks.trained_parameters(self._module, self.optimizers)[0])

    def _prepare(self, run_step: Any) -> Prepared:
        reshard(self._module)  # validation leaves parameters of the root gathered
        return super()._prepare(run_step)


def _check_settings(clipping_engine: str, max_physical_batch_size: object) -> None:
    if clipping_engine == "loop":
        raise PrivacyConfigurationError(
            "clipping_engine='loop' with DPFSDPStrategy: a backward pass per sample would be reduced over all "
            "processes, sample by sample. Use clipping_engine='book', or DPStrategy if the model fits into one device."
        )
    if max_physical_batch_size == "auto":
        raise PrivacyConfigurationError(
            "max_physical_batch_size='auto' with DPFSDPStrategy: sizes are tried by each process on its own, and "
            "sharded parameters can only be gathered by all of them at once. Give a number."
        )


def _check_fit(module: pl.LightningModule, trained: Mapping[str, Any]) -> None:
    if not module.automatic_optimization:
        raise PrivacyConfigurationError(
            f"{type(module).__name__} has automatic_optimization=False: under DPFSDPStrategy only training steps that "
            "return their loss are private. Use automatic optimization, or DPStrategy if the model fits into one "
            "device."
        )
    for name, parameter in trained.items():
        ShardOf(name, parameter)


StrategyRegistry.register(
    DPFSDPStrategy.strategy_name, DPFSDPStrategy, description="Differentially private training of a sharded model"
)
