"""A forecast as tables and sentences, readable at 100 columns.

Owns: which numbers are shown, and how. Does not own: the numbers. Every table is printed as soon as it is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_dp.accounting import MAX_RELEASES
from lightning_dp.forecasting.improvement import Improvement, sentence_of, table_of
from lightning_dp.forecasting.result import BatchOption, Forecast

_WIDTH = 100


def new_console() -> Console:
    """Return a console for standard output; 100 columns wide if that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def print_forecast(forecast: Forecast, answer: str) -> None:
    """Print a forecast.

    Args:
        forecast: What to print.
        answer: What was asked for, in a sentence; see `answer_of`.
    """
    console = new_console()
    console.print(Text(answer, style="bold"))
    head = Table(show_header=False)
    for name, value in _settings(forecast):
        head.add_row(name, value)
    console.print(head)
    print_budget(forecast, console)


def answer_of(forecast: Forecast, asked: str) -> str:
    """Return the answer to what was asked for.

    Args:
        forecast: All the numbers.
        asked: ``"target_epsilon"``, ``"noise_multiplier"`` or ``"num_steps"``: the one that was not given.
    """
    noise, delta = f"noise multiplier {forecast.noise_multiplier:.4g}", f"at delta {forecast.delta:.3g}"
    endless = "at least " if forecast.num_steps == MAX_RELEASES else ""
    steps, spent = f"{endless}{forecast.num_steps:,} steps", f"epsilon {forecast.epsilon:.4g}"
    if asked == "target_epsilon":
        return f"Epsilon: {steps} with {noise} spend {spent} {delta}."
    of_target = f"{spent} of {forecast.target_epsilon:g} {delta}"
    if asked == "num_steps":
        return f"Steps: {steps} with {noise} fit; they spend {of_target}."
    return f"Noise: with {noise}, {steps} spend {of_target}."


def print_budget(forecast: Forecast, console: Console) -> None:
    """Print the tables of a forecast, each as soon as it is computed.

    Args:
        forecast: What to print.
        console: Where to.
    """
    _print(console, _steps(forecast))
    if forecast.noise_for:
        _print(console, _noise(forecast))
    if forecast.batches:
        _print(console, _batches(forecast))
        console.print(Text(_best(forecast)))
    if forecast.spent:
        console.print(Text("Noise and batch size were settled by the releases made before: no other is shown."))
    elif forecast.after is not None:
        console.print(Text("Noise and batch size follow a schedule: no other is shown."))


def print_improvement(improvement: Improvement, console: Console) -> None:
    """Print what steps improve, by batch size.

    Args:
        improvement: What to print.
        console: Where to.
    """
    names, *rows = table_of(improvement)
    table = _table("What a private step improves, by batch size", *(name.replace(" ", "\n", 1) for name in names))
    for step, cells in zip(improvement.steps, rows, strict=True):
        here = step.batch_size == improvement.planned.batch_size
        table.add_row(*cells, "planned" if here else "", style="bold" if here else None)
    _print(console, table)
    console.print(Text(sentence_of(improvement)))


def _settings(forecast: Forecast) -> Iterator[tuple[str, str]]:
    if forecast.num_examples is not None:
        yield f"training {forecast.unit}s (N)", f"{forecast.num_examples:,}"
        yield "expected batch", f"{forecast.batch_size:g}"
    yield "sample rate", f"{forecast.sample_rate:.4g}"
    yield "steps", f"{forecast.num_steps:,}, that is {_passes(forecast, forecast.num_steps)} passes over the data"
    yield "noise multiplier", f"{forecast.noise_multiplier:.4g}"
    yield (
        "epsilon after these",
        f"{forecast.epsilon:.4f}" + ("" if forecast.target_epsilon is None else f" of {forecast.target_epsilon:g}"),
    )
    yield "delta", f"{forecast.delta:.3g}"
    yield "accountant", str(getattr(forecast.accountant, "name", forecast.accountant))
    yield "holds for", f"adding or removing one training {forecast.unit}"


def _steps(forecast: Forecast) -> Table:
    before = sum(phase.num_releases for phase in forecast.spent)
    title = f"Epsilon over further steps, after {before:,} made before" if before else "Epsilon over the steps"
    table = _table(title, "further steps" if before else "steps", "passes", "epsilon")
    for row in forecast.after_steps:
        end = row.num_steps == forecast.num_steps
        marks = ["planned end"] if end else []
        if row.num_steps == forecast.num_allowed:
            marks.append(f"the last within {forecast.target_epsilon:g}")
        cells = f"{row.num_steps:,}", _passes(forecast, row.num_steps), f"{row.epsilon:.4f}"
        table.add_row(*cells, ", ".join(marks), style="bold" if marks else None)
    return table


def _noise(forecast: Forecast) -> Table:
    of_target = forecast.target_epsilon is not None
    table = _table(f"Noise for other epsilons, {forecast.num_steps:,} steps", "epsilon", "noise multiplier")
    for row in forecast.noise_for:
        here = row.epsilon == forecast.goal
        mark = ("target" if of_target else "planned") if here else ""
        table.add_row(f"{row.epsilon:.4g}", f"{row.noise_multiplier:.4g}", mark, style="bold" if here else None)
    return table


def _batches(forecast: Forecast) -> Table:
    title = f"Other batch sizes, the same work ({_passes(forecast, forecast.num_steps)} passes), epsilon "
    size = "batch\nsize" if forecast.unit == "example" else "users in\na batch"
    known = [size] if forecast.num_examples is not None else []
    noise = ["noise/signal\nof a step", "noise/signal\nof the run"] if known else []
    names = (*known, "sample\nrate", "steps", "noise\nmultiplier", *noise, "over\nleast")
    table = _table(f"{title}{forecast.goal:.4g}", *names)
    least = min(option.noise_per_run_times_n for option in forecast.batches)
    for option in forecast.batches:
        marks = ["planned"] if option.sample_rate == forecast.sample_rate else []
        marks += ["best"] if option == forecast.best_batch else []
        cells = *_cells(option), f"{option.noise_per_run_times_n / least:.2f}"
        table.add_row(*cells, ", ".join(marks), style="bold" if marks else None)
    return table


def _cells(option: BatchOption) -> Iterator[str]:
    if option.batch_size is not None:
        yield f"{option.batch_size:,.6g}"
    yield f"{option.sample_rate:.4g}"
    yield f"{option.num_steps:,}"
    yield f"{option.noise_multiplier:.4g}"
    if option.noise_per_step is not None and option.noise_per_run is not None:
        yield f"{option.noise_per_step:.3g}"
        yield f"{option.noise_per_run:.3g}"


def _best(forecast: Forecast) -> str:
    best = forecast.best_batch
    assert best is not None, "there are batches"
    size = f"sample rate {best.sample_rate:.4g}"
    if best.batch_size is not None:
        count = f"{best.batch_size:,.6g}"
        size = f"batch size {count}" if forecast.unit == "example" else f"{count} users in a batch"
    return (
        f"Best by noise: {size}, the smallest whose noise over the run is within 5 % of the least. Noise/signal is the "
        "noise on the mean gradient over max_grad_norm; over a run it grows with sqrt(steps), a signal with steps. "
        "This knows nothing of the learning rate, which a larger batch wants larger, nor of how many steps a model "
        "needs. A larger batch needs no more memory, as physical batches bound that. See arXiv 2303.00654, section 5, "
        "and 2210.03403."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _print(console: Console, table: Table) -> None:
    """Print a table under its title, which may be wider."""
    title, table.title = table.title, None
    console.print(Text(str(title), style="italic"))
    console.print(table)


def _passes(forecast: Forecast, num_steps: int | None) -> str:
    return f"{(num_steps or 0) * forecast.sample_rate:,.3g}"
