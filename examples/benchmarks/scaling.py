"""Private and ordinary training on several processes: time of a step, and bytes that each process sends into it.

    python examples/benchmarks/scaling.py [--processes 1 2 4] [--batch-size 64] [--steps 20] [--width 512]

Weak scaling: each process has ``--batch-size`` examples, so that more processes make larger steps. Strong scaling: all
of them have so many together. Every row is a fit of its own, started by ``torch.distributed.run``; the time is the
median of the later half of its steps, and so takes the slowest process into account. Efficiency is the throughput of a
process as a share of that of one process alone, of the same kind of training. Bytes are those of the tensors that are
given to ``torch.distributed.all_reduce``, by which DDP's buckets go here, too. Private training sends eight bytes
more for each process, which say that its step and its weights are the same.

More processes than cores take turns: on such a machine only ratios of private to ordinary training and the bytes say
something.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp

CLASSES = 10


class Network(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, CLASSES))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Meter(pl.Callback):
    """Notes when steps end, and how many bytes were given to all-reduces until then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sent: list[int] = []
        self._bytes = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = trainer.strategy.model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, allreduce_hook)  # its own way goes by no function of Python
        reduce = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._bytes += tensor.numel() * tensor.element_size()
            return reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.sent.append(self._bytes)

    def facts(self) -> dict[str, float]:
        """Return the median time and the bytes of a step in the later half."""
        half = len(self.ends) // 2
        seconds = [b - a for a, b in zip(self.ends[half:-1], self.ends[half + 1 :], strict=True)]
        sent = [b - a for a, b in zip(self.sent[half:-1], self.sent[half + 1 :], strict=True)]
        return {"seconds": statistics.median(seconds), "bytes": statistics.median(sent)}


def fit(options: argparse.Namespace) -> None:
    """Make one fit, in one process of several, and write what the first of them has measured."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    size, meter = int(os.environ.get("WORLD_SIZE", 1)), Meter()
    number = 100 * size * options.batch_size
    torch.manual_seed(0)  # every process has the same data
    data = TensorDataset(torch.randn(number, options.width), torch.randint(CLASSES, (number,)))
    private = options.fit == "private"
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=size,
        strategy=ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2 * options.batch_size)
        if private
        else DDPStrategy()
        if size > 1
        else "auto",
        max_steps=options.steps,
        callbacks=[meter],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(Network(options.width), DataLoader(data, batch_size=options.batch_size, shuffle=True))
    if trainer.is_global_zero:
        Path(options.out).write_text(json.dumps(meter.facts()))


def measured(options: argparse.Namespace, kind: str, size: int, batch_size: int) -> dict[str, float]:
    """Return what a fit on so many processes has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--standalone"] if size > 1 else []
        settings = {"steps": options.steps, "width": options.width, "accelerator": options.accelerator}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        own = [__file__, f"--fit={kind}", f"--out={out}", f"--batch-size={batch_size}", *arguments]
        subprocess.run([sys.executable, *launcher, *own], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def table(options: argparse.Namespace) -> None:
    """Print both kinds of scaling as Markdown."""
    cores = len(os.sched_getaffinity(0))
    print(f"{os.cpu_count()} cores, of which {cores} may be used; accelerator {options.accelerator}.\n")
    columns = "processes", "batch of all", "private step", "ordinary step", "private / ordinary"
    print("| " + " | ".join(("scaling", *columns, "efficiency (ordinary)", "bytes (ordinary)")) + " |")
    print("| --- " + "| ---: " * (len(columns) + 2) + "|")
    for scaling in ("weak", "strong"):
        alone: dict[str, float] = {}
        for size in options.processes:
            own = options.batch_size if scaling == "weak" else max(1, options.batch_size // size)
            found = {kind: measured(options, kind, size, own) for kind in ("private", "ordinary")}
            rate = {kind: own / facts["seconds"] for kind, facts in found.items()}  # of one process
            alone = alone or rate
            share = {kind: f"{rate[kind] / alone[kind]:.2f}" for kind in rate}
            private, ordinary = found["private"], found["ordinary"]
            print(
                f"| {scaling} | {size} | {own * size} | {1e3 * private['seconds']:.1f} ms "
                f"| {1e3 * ordinary['seconds']:.1f} ms | {private['seconds'] / ordinary['seconds']:.2f} "
                f"| {share['private']} ({share['ordinary']}) | {private['bytes']:,.0f} ({ordinary['bytes']:,.0f}) |",
                flush=True,
            )


def main() -> None:
    """Print the table, or make one fit for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--fit", choices=["private", "ordinary"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    fit(options) if options.fit else table(options)


if __name__ == "__main__":
    main()
