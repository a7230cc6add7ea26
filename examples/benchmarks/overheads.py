"""What bookkeeping of privacy costs in every step: budget and ledger, journal, and `PrivacyMonitor`.

    python examples/benchmarks/overheads.py [--steps 10000] [--step-ms 10] [--history 50] [--directory .] [--inside]

A real fit, of steps that take 10 ms, with a checkpoint at its start, so that the journal is kept beside it. Timed are
the calls themselves, in the fit: `check_next` and `book` of the budget (ledger and journal are in `book`) and the hook
of the monitor, with Lightning's `log` in it. Fits without a history and with one of 50 processes take turns in rounds;
the figures are over all rounds. The mean tells what a fit pays; the median, what a step pays that writes to no disk.
The first call of each in a fit, which looks up epsilon for all steps to come, is not in the mean but beside it.
`--inside` also times the journal and its writes, which makes the rest slower: to time a call takes as long as a call.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.accounting import Journal, Release
from lightning_dp.accounting import journal as journal_module
from lightning_dp.budget import PrivacyBudget

Times = dict[str, list[float]]

TIMED = {
    "budget.check_next": (PrivacyBudget, "check_next"),
    "budget.book": (PrivacyBudget, "book"),
    "monitor": (ldp.PrivacyMonitor, "on_train_batch_end"),
}
INSIDE = {"in book, the journal": (Journal, "reserve"), "in that, a write": (journal_module, "replace_file")}


class Busy(pl.LightningModule):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.net, self.seconds = nn.Linear(2, 1), seconds
        self.work = torch.randn(64, 64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:  # busy, as training is: a processor that slept is slow for a while
            torch.mm(self.work, self.work)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveFirst(pl.Callback):
    """A checkpoint at the start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / "start.ckpt")


class Timer:
    """Times calls; `check_next` is called by itself and by `book`, which is one call then."""

    def __init__(self) -> None:
        self.outer = ""

    def timed(self, name: str, function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.outer and name in TIMED:
                return function(*args, **kwargs)
            before, self.outer = self.outer, name
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)
                self.outer = before

        return run


def fit(steps: int, step_seconds: float, history: int, parent: Path, inside: bool) -> Times:
    """Fit, and return what the calls took."""
    times: Times = {name: [] for name in (TIMED | INSIDE if inside else TIMED)}
    timer = Timer()
    # The accountant works before the first step only: a fast one, as it is not what is measured.
    settings = {"noise_multiplier": 5.0, "target_epsilon": 100.0, "target_delta": 1e-4, "accountant": "rdp"}
    strategy = ldp.DPStrategy(**settings, self_check=False, max_physical_batch_size=64)  # one forward a step
    for i in range(history):
        row = Release(5.0, 0.01, num_units=1000).as_row(100)
        strategy._run.ledger.merge({"version": 2, "segments": {f"{i:032x}": [row]}})
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent)))
        for name, seconds in times.items():
            owner, attribute = (TIMED | INSIDE)[name]
            replacement = timer.timed(name, getattr(owner, attribute), seconds)
            stack.enter_context(patch.object(owner, attribute, replacement))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            strategy=strategy,
            callbacks=[ldp.PrivacyMonitor(summary=False), ldp.PrivacyBudgetStopping(), SaveFirst(directory)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        dataset = TensorDataset(torch.randn(1000, 2))
        trainer.fit(Busy(step_seconds), DataLoader(dataset, batch_size=10, shuffle=True))
    return times


def report(name: str, fits: list[Times], steps: int, step_seconds: float) -> None:
    print(f"\n{name}: microseconds      median    mean   calls   mean per step   first call")
    total = 0.0
    for what in fits[0]:
        later = [value for times in fits for value in times[what][1:]]
        first = statistics.median(times[what][0] for times in fits)
        per_step = sum(later) / steps
        total += per_step if what in TIMED else 0.0
        figures = [1e6 * value for value in (statistics.median(later), statistics.mean(later), per_step, first)]
        print("{:<28}{:9.1f}{:8.1f}{:8d}{:16.1f}{:13.0f}".format(what, *figures[:2], len(later), *figures[2:]))
    print(f"in all {1e6 * total:.1f} microseconds a step, {total / step_seconds:.2%} of {1e3 * step_seconds:g} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=10_000, help="of each of the two, in all rounds together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--history", type=int, default=50, help="processes in the long history")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--inside", action="store_true", help="time the journal and its writes too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, seconds = options.steps // options.rounds, options.step_ms / 1e3
    found: dict[int, list[Times]] = {0: [], options.history: []}
    for _ in range(options.rounds):
        for history, fits in found.items():
            fits.append(fit(steps, seconds, history, options.directory, options.inside))
    for history, fits in found.items():
        report(f"history of {history} processes", fits, steps * options.rounds, seconds)


if __name__ == "__main__":
    main()
