"""The cost against the length of a sequence, and against the size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workloads import Workload

from lightning_dp.benchmarking import Results
from lightning_dp.plotting import new_figure

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
WIDTHS = (256, 512, 768, 1024, 1280)


def lengths(workload: Workload, points: Sequence[int] | None) -> list[Workload]:
    """Return the workload with other lengths, and as many tokens in a physical batch as far as possible."""
    tokens = workload.physical * workload.length
    return [replace(workload, length=n, physical=max(1, tokens // n)) for n in points or LENGTHS]


def sizes(workload: Workload, points: Sequence[int] | None) -> list[Workload]:
    """Return the workload with other widths, deeper as they are wider."""
    return [replace(workload, width=n, layers=max(1, n // 64)) for n in points or WIDTHS]


SWEEPS = {"length": lengths, "size": sizes}


def draw_sweep(kind: str, workloads: Sequence[Workload], found: Sequence[Results], file: Path) -> None:
    """Draw seconds per token of every variant, and its ratios, over the points of a sweep.

    Args:
        kind: What differs between the points, of `SWEEPS`.
        workloads: The points.
        found: What was measured there.
        file: Where to.
    """
    figure, (cost, compared) = new_figure(1, 2)
    at = [workload.length if kind == "length" else workload.width for workload in workloads]
    for name in dict.fromkeys(row.name for results in found for row in results.rows):
        rows = [{row.name: row for row in results.rows}.get(name) for results in found]
        measured = [
            (x, row.seconds_per_example / workload.length)
            for x, workload, row in zip(at, workloads, rows, strict=True)
            if row is not None and row.steps
        ]
        cost.plot(*zip(*measured, strict=True), marker="o", label=name) if measured else None
    for name in dict.fromkeys((ratio.name, ratio.other) for results in found for ratio in results.ratios):
        measured = [
            (x, ratio.time)
            for x, results in zip(at, found, strict=True)
            for ratio in results.ratios
            if (ratio.name, ratio.other) == name
        ]
        compared.plot(*zip(*measured, strict=True), marker="o", label=" / ".join(name))
    for axes, label in ((cost, "seconds per token"), (compared, "time, ratio")):
        axes.set(xscale="log", xlabel={"length": "tokens of an example (T)", "size": "width"}[kind], ylabel=label)
        axes.set_xticks(at, labels=map(str, at), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    cost.set_yscale("log")
    compared.set_ylim(bottom=0)
    figure.savefig(file, dpi=150)
