"""What a private step costs besides arithmetic: a plain step of Lightning and a private one of the same module.

    python examples/benchmarks/step_overheads.py [--steps 200] [--rounds 5] [--only gpt2]

The modules are so narrow that arithmetic is next to nothing: what is left is Python, Lightning and torch's dispatch,
which cost the same for a module of any width. Plain and private fits take turns in rounds, each with batches of 8
examples on average in one physical batch. A step is timed from the end of the one before to its own, in the time of the
processor, which leaves out what others do on the machine; the figures are medians over all rounds. Book-keeping works
on every function that a parameter enters, so that the difference is also divided by their number. "Clip, noise" is the
time inside `PrivateStep`, a part of the difference: norms, clipped sums and noise, which are arithmetic, although here
on tensors with next to nothing in them.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.private_step import PrivateStep

ARITHMETIC = ("collect", "release")


class Tiny(pl.LightningModule):
    """A module with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Gpt2(Tiny):
    """A GPT-2 of twelve layers, 148 parameters, and next to no width."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=50, n_positions=4, n_embd=8, n_layer=12, n_head=1)
        self.net = GPT2LMHeadModel(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens = batch[0]
        logits = self.net(tokens).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


MODULES: dict[str, tuple[Callable[[], Tiny], Tensor]] = {
    "tiny": (Tiny, torch.randn(1000, 2)),
    "gpt2": (Gpt2, torch.randint(50, (1000, 4))),
}


class Clock(pl.Callback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.process_time())

    def seconds(self) -> list[float]:
        """Return what the steps took; the first ones, which look at the module, are left out."""
        return [b - a for a, b in zip(self.ends[5:], self.ends[6:], strict=False)]


class Counter(TorchFunctionMode):
    """Counts the functions that a parameter enters and that do something with it."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        entered = any(isinstance(leaf, nn.Parameter) for leaf in tree_leaves((args, kwargs)))
        self.count += entered and isinstance(result, Tensor) and func not in PARENTS
        return result


PARENTS = {nn.functional.multi_head_attention_forward}


def count_functions(module: Tiny, batch: Tensor) -> int:
    """Return how many functions of one forward pass a parameter enters."""
    with Counter() as counter:
        module.training_step([batch], 0)
    return counter.count


def fit(name: str, steps: int, private: bool) -> list[float]:
    """Fit, and return what the steps took."""
    make, data = MODULES[name]
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-4, "accountant": "rdp", "max_physical_batch_size": 64}
    strategy: Any = ldp.DPStrategy(self_check=False, **settings) if private else "auto"
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps + 6,
        strategy=strategy,
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(make(), DataLoader(TensorDataset(data), batch_size=8, shuffle=True, drop_last=True))
    return clock.seconds()


@contextmanager
def timing_arithmetic() -> Iterator[dict[str, list[float]]]:
    """Time what is inside `PrivateStep`."""
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str) -> Callable[..., None]:
        function = getattr(PrivateStep, name)

        def run(*args: Any) -> None:
            start = time.process_time()
            function(*args)
            found[name].append(time.process_time() - start)

        return run

    with patch.multiple(PrivateStep, **{name: timed(name) for name in ARITHMETIC}):
        yield found


def compare(name: str, steps: int, rounds: int) -> None:
    """Let plain and private fits take turns, and print what their steps took."""
    make, data = MODULES[name]
    functions = count_functions(make(), data[:8])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    arithmetic: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for private, found in seconds.items():
            with timing_arithmetic() as timed:
                found += fit(name, steps, private)
            for what, times in timed.items():
                arithmetic[what] += times
    plain, private = (1e6 * statistics.median(seconds[which]) for which in (False, True))
    inside = sum(1e6 * statistics.median(times) for times in arithmetic.values())
    for what, value in {"difference": private - plain, "without clip, noise": private - plain - inside}.items():
        print(
            f"{name:<6}{what:<20}plain {plain:8.0f}   private {private:8.0f}   difference {value:8.0f} us"
            f"   {value / 1e4:6.1%} of 10 ms   {value / functions:6.1f} us for each of {functions} functions"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=200, help="of each fit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=MODULES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in [options.only] if options.only else MODULES:
        compare(name, options.steps, options.rounds)


if __name__ == "__main__":
    main()
