"""What a little public data is worth: handwritten digits at epsilon 1, with and without a tenth that is public.

    python examples/digits_public_private.py --seeds 5

prints a table, in some minutes on 2 cores: 0.949 with public data, 0.918 without, 0.930 with public data alone (means
of 10 runs, epsilon 0.999, delta 1e-4). All fits have the same epsilon, delta and accountant, and are tested on the same
360 images. Private training alone has all 1,437 training examples, with the settings of configs/digits.yaml; the others
have 144 of them as public and the rest as private data, with those of configs/digits_public_private.yaml.
"""

import argparse
import logging
from collections.abc import Callable
from statistics import mean

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

import lightning_dp as ldp
from lightning_dp.demos.digits import DigitsClassifier, DigitsDataModule

Fit = tuple[float, float, int]
"""Test accuracy, epsilon, private steps."""


def private_only(seed: int) -> Fit:
    """Settings of configs/digits.yaml, at epsilon 1."""
    strategy = ldp.DPStrategy(target_epsilon=1.0, target_delta=1e-4, clipping="automatic")
    return fit(seed, DigitsClassifier(), DigitsDataModule(), strategy, 30)


def public_then_private(seed: int) -> Fit:
    """Settings of configs/digits_public_private.yaml."""
    strategy = ldp.DPStrategy(target_epsilon=1.0, target_delta=1e-4)
    return fit(
        seed, DigitsClassifier(lr=1.3), with_public(), strategy, 40, ldp.PublicPretraining(patience=5, min_delta=0.01)
    )


def public_only(seed: int) -> Fit:
    """Only the public examples, without noise and with as many steps."""
    data = with_public()
    data.train_dataloader = data.public_dataloader  # type: ignore[method-assign]
    return fit(seed, DigitsClassifier(lr=1.3), data, "auto", 120)


def with_public() -> DigitsDataModule:
    return DigitsDataModule(646, public_share=0.1, public_batch_size=72)


def fit(
    seed: int,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    strategy: ldp.DPStrategy | str,
    max_epochs: int,
    *callbacks: pl.Callback,
) -> Fit:
    pl.seed_everything(seed, verbose=False)
    model = type(model)(**model.hparams)  # with the weights of this seed
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    (results,) = trainer.test(model, data, verbose=False)
    spent = (strategy.epsilon, strategy.num_releases) if isinstance(strategy, ldp.DPStrategy) else (0.0, 0)
    return results["test accuracy"], *spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many fits of each kind")
    seeds = range(parser.parse_args().seeds)
    for name in ("lightning.pytorch", "lightning_dp"):
        logging.getLogger(name).setLevel(logging.ERROR)
    table = Table("training", "epsilon", "private steps", "accuracy, mean", "lowest", "highest")
    kinds: dict[str, Callable[[int], Fit]] = {
        "private alone, 1,437": private_only,
        "public 144, then private 1,293": public_then_private,
        "public alone, 144": public_only,
    }
    for name, kind in kinds.items():
        found = [kind(seed) for seed in seeds]
        accuracies = [accuracy for accuracy, *_ in found]
        _, epsilon, steps = found[0]
        numbers = [f"{number:.3f}" for number in (mean(accuracies), min(accuracies), max(accuracies))]
        table.add_row(name, f"{epsilon:.3f}", str(steps), *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
