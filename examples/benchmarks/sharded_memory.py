"""What private training of a sharded model takes of the memory of each process, against ordinary FSDP2.

Run it on the CPU: ``torchrun --nproc-per-node 2 examples/benchmarks/sharded_memory.py``, and with ``--private`` once
more; with ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment, so that what is freed is not resident any more. It
prints the largest resident set of each process, less what was resident before the model was built: shards, gathered
parameters, optimizer state, activations, gradients, buffers of the collectives, and what is looked at before the first
step. A private step has one or two physical batches here, an ordinary one has one.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.benchmarking.memory import PeakMemory

TOKENS, LENGTH, EXAMPLES, STEPS = 2000, 64, 64, 3


class Transformer(pl.LightningModule):
    """Names the class of a sequence."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True) for _ in range(depth)]
        )
        self.head = nn.Linear(width, 10)

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4, help="of each process")
    parser.add_argument("--devices", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = TensorDataset(torch.randint(0, TOKENS, (EXAMPLES, LENGTH)), torch.randint(0, 10, (EXAMPLES,)))
    loader = DataLoader(data, batch_size=arguments.batch_size, shuffle=True)
    private = ldp.DPFSDPStrategy(noise_multiplier=1.0, max_physical_batch_size=arguments.batch_size)
    ordinary = ModelParallelStrategy(data_parallel_size=arguments.devices, tensor_parallel_size=1)
    trainer = pl.Trainer(
        strategy=private if arguments.private else ordinary,
        accelerator="cpu",
        devices=arguments.devices,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    memory = PeakMemory()
    memory.reset(torch.device("cpu"))
    module = Transformer(arguments.width, arguments.depth)
    trainer.fit(module, loader)
    taken, parameters = memory.measured(), sum(p.numel() for p in module.parameters())
    assert taken is not None, "Linux tells"
    print(
        f"process {trainer.global_rank} of {trainer.world_size}, {'private' if arguments.private else 'ordinary'}: "
        f"{taken.for_training / 1e6:.1f} MB at the peak, {parameters / 1e6:.1f} million parameters"
    )


if __name__ == "__main__":
    main()
