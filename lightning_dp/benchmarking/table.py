"""Results as a table in the terminal, in Markdown and as JSON.

Owns: which figures are shown, and how. Does not own: the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_dp.benchmarking.result import Ratio, Results, Row
from lightning_dp.forecasting.tables import new_console
from lightning_dp.plain import VERSION, to_plain

_ROWS = ("training", "trained", "a step", "physical batch", "in a batch", "peak memory", "above imports")
_RATIOS = ("over", "time", "quartiles", "memory")


def print_results(results: Results) -> None:
    """Print results.

    Args:
        results: What was measured.
    """
    console = new_console()
    for title, columns, cells in _tables(results):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for k, column in enumerate(columns):
            table.add_column(column, justify="right" if k else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
    for sentence in _sentences(results):
        console.print(Text(sentence))


def as_markdown(results: Results) -> str:
    """Return results as a section of Markdown.

    Args:
        results: What was measured.
    """
    lines = [f"## {results.title}", "", str(results.machine), ""]
    for title, columns, cells in _tables(results):
        lines += [f"{title}:", "", _line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
        lines += [*map(_line, cells), ""]
    return "\n".join([*lines, *_sentences(results), ""])


def write_json(results: Sequence[Results], file: Path) -> None:
    """Write results with every single step, so that they can be compared in other ways.

    Args:
        results: What was measured.
        file: Where to.
    """
    file.write_text(json.dumps({"version": VERSION, "results": to_plain(results)}, indent=1) + "\n")


def _tables(results: Results) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    yield "Time and memory", _ROWS, [list(_cells(row)) for row in results.rows]
    if results.ratios:
        yield "In comparison", _RATIOS, [list(_compared(ratio)) for ratio in results.ratios]


def _cells(row: Row) -> Iterator[str]:
    yield row.name
    yield "-" if row.facts is None else f"{row.facts.num_trained:,}"
    if row.facts is None or not row.steps:
        yield from [row.note, *["-"] * (len(_ROWS) - 3)]
        return
    yield _seconds(row.seconds_per_step)
    yield _seconds(row.seconds_per_batch)
    yield f"{row.facts.physical_batch_size:,}"
    memory = row.memory
    yield from ("-", "-") if memory is None else (_bytes(memory.peak), _bytes(memory.for_training))


def _compared(ratio: Ratio) -> Iterator[str]:
    yield f"{ratio.name} / {ratio.other}"
    yield f"{ratio.time:.3g}"
    yield f"{ratio.low:.3g} to {ratio.high:.3g}"
    yield "-" if ratio.memory is None else f"{ratio.memory:.3g}"


def _sentences(results: Results) -> Iterator[str]:
    """Say how the figures came about."""
    measured = [row for row in results.rows if row.steps]
    if not measured:
        return
    yield (
        f"Medians of {len(measured[0].steps)} optimizer steps of each, taken in turns; a ratio is the median over "
        "steps side by side. Time is by the example, as draws differ in size: 'physical batch' is the time of as many "
        "examples as a full one has."
    )
    sources = {row.memory.source for row in measured if row.memory is not None}
    if sources:
        yield f"Memory: {', '.join(sorted(sources))}; its ratio is of what lies above the level just after imports."


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _bytes(number: int) -> str:
    mebibytes = number / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1000 else f"{mebibytes:.0f} MiB"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
