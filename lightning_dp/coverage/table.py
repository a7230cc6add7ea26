"""A plan as tables and sentences, readable at 100 columns.

Owns: which facts are shown, and how. Does not own: the facts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_dp.bookkeeping.noting import Refusal
from lightning_dp.coverage.names import collapsed
from lightning_dp.coverage.report import Coverage, Covered, Plan
from lightning_dp.forecasting.tables import new_console, print_budget, print_improvement

_NAME_WIDTH = 32


def print_plan(plan: Plan) -> None:
    """Print a plan.

    Args:
        plan: What ``lightning_dp.plan`` returned.
    """
    console = new_console()
    console.print(_head(plan))
    if plan.coverage is not None and plan.coverage.covered:
        console.print(_table(plan.coverage))
    for sentence in _sentences(plan):
        console.print(Text(sentence))
    if plan.forecast is not None:
        print_budget(plan.forecast, console)
    if plan.improvement is not None:
        print_improvement(plan.improvement, console)
    for refusal in plan.coverage.refused if plan.coverage is not None else ():
        console.print(Panel(Text(refusal.reason), title=Text(_title(refusal)), title_align="left"))
    for error in plan.errors:
        console.print(Panel(Text(error), title="Refused", title_align="left"))
    for sentence in _conclusion(plan):
        console.print(Text(sentence))


def _head(plan: Plan) -> Table:
    table = Table(title="Privacy plan", show_header=False, title_justify="left")
    for name, value in _settings(plan):
        table.add_row(Text(name), Text(value), style="bold" if name.startswith("epsilon") else None)
    return table


def _settings(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "model", plan.model
    yield "parameters", f"{plan.num_trained:,} trainable, {plan.num_frozen:,} frozen"
    if plan.num_examples is None:
        return
    if plan.num_users is None:
        yield "training examples (N)", f"{plan.num_examples:,}"
    else:
        yield "training users (N)", f"{plan.num_users:,}, with {plan.num_examples:,} examples"
    yield "expected batch", f"{plan.expected_batch_size:g}{_of_each(plan)}"
    yield "sample rate", f"{plan.sample_rate:.4g}"
    yield "physical batch", f"at most {plan.physical_batch_size:,}"
    yield ("planned steps" if plan.steps_per_batch == 1 else "planned logical batches"), _steps(plan)
    yield "clipping", plan.clipping
    yield "max_grad_norm", f"{plan.max_grad_norm:g}"
    yield "noise multiplier", f"{plan.noise_multiplier:.4g}"
    of_target = "" if plan.target_epsilon is None else f" of {plan.target_epsilon:g}"
    yield "epsilon after these", "grows without end" if plan.epsilon is None else f"{plan.epsilon:.4f}{of_target}"
    yield "delta", f"{plan.delta:.3g}"


def _of_each(plan: Plan) -> str:
    views = f", {plan.views_per_example} views of each" if plan.views_per_example > 1 else ""
    return ("" if plan.num_users is None else f" examples, {plan.examples_per_user} of each user") + views


def _steps(plan: Plan) -> str:
    planned = "no limit" if plan.planned_steps is None else f"{plan.planned_steps:,}"
    if plan.steps is None or plan.steps == plan.planned_steps:
        return planned
    return f"{planned}, {plan.steps:,} of them to come within the budget"


def _table(coverage: Coverage) -> Table:
    groups = collapsed(coverage.covered, lambda row: row.name, _looks)
    prefix = _prefix([name for name, _ in groups])
    title = "Per-sample gradients" + (f" of {prefix}*" if prefix else "")
    names = [name.removeprefix(prefix) + (f" ×{len(rows)}" if len(rows) > 1 else "") for name, rows in groups]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold", min_width=min(_NAME_WIDTH, max(map(len, names))))
    for column, width in _COLUMNS.items():
        table.add_column(column, overflow="fold", max_width=width)
    for column in ("bytes", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    total = sum(row.seconds or 0.0 for row in coverage.covered)
    for name, (_, rows) in zip(names, groups, strict=True):
        table.add_row(*map(Text, (name, *_cells(rows, total))))
    return table


def _cells(rows: Sequence[Covered], total: float) -> Iterator[str]:
    """Yield what stands beside the name of parameters that look alike."""
    yield "×".join(map(str, rows[0].shape)) or "scalar"
    yield ", ".join(rows[0].functions) or "any"
    yield " + ".join(rows[0].methods)
    yield _bytes(sum(row.bytes_per_sample for row in rows))
    yield f"{sum(row.seconds or 0.0 for row in rows) / total:.0%}" if total else "-"


def _prefix(names: Sequence[str]) -> str:
    """Return the dotted beginning that all names share, if some name is too long with it."""
    if max(map(len, names)) < _NAME_WIDTH:
        return ""
    return ".".join([*os.path.commonprefix([name.split(".")[:-1] for name in names]), ""])


_COLUMNS = {"shape": 12, "function": 15, "norm of a sample": 18}
"""The columns that wrap, and how wide they may be."""


def _looks(row: Covered) -> tuple[object, ...]:
    return row.shape, row.functions, row.methods


def _sentences(plan: Plan) -> Iterator[str]:
    if plan.public_steps:
        yield plan.public_steps
    if plan.physical_batch:
        yield plan.physical_batch
    if plan.coverage is not None and any(row.seconds is not None for row in plan.coverage.covered):
        yield (
            "bytes: what is saved for the backward pass and kept for norms and sums, per sample; time: share of what "
            "entries, norms and clipped sums take; both measured on one physical batch."
        )
    if plan.engine == "loop":
        yield (
            "clipping_engine='loop': no book is kept. Every sample has a backward pass of its own, whatever functions "
            "the parameters enter; bytes are those of one gradient."
        )
    if plan.frozen:
        yield f"Frozen: {plan.frozen} parameters with {plan.num_frozen:,} elements, for which nothing is held."
    if plan.untrained:
        yield f"Not trained by the optimizer, and treated as constants: {_names(plan.untrained)}."
    if plan.public:
        yield (f"Trained without noise, as their gradients do not depend on the training data: {_names(plan.public)}.")
    if plan.coverage is not None and plan.coverage.unused:
        yield (
            f"Warning: no gradient came back to {_names(plan.coverage.unused)}: only noise would reach them. Use them "
            "in the loss, or freeze them (requires_grad_(False))."
        )


def _conclusion(plan: Plan) -> Iterator[str]:
    if plan.num_examples is not None:
        yield f"Self-check: {plan.self_check}."
    if plan.time_ratio is not None and plan.coverage is not None:
        way = "one by one, against one batch" if plan.engine == "loop" else "in one physical batch"
        yield (
            f"In all: a private forward and backward pass takes {plan.time_ratio:.2f} times as long as an ordinary one "
            f"({plan.timed_samples} samples {way}; least times, measured in turns), and "
            f"{'the gradient' if plan.engine == 'loop' else 'the book'} holds "
            f"{_bytes(plan.coverage.bytes_per_sample)} per sample."
        )
    if plan.is_refused:
        yield "This fit would be refused."


def _title(refusal: Refusal) -> str:
    function = f"{refusal.function} of " if refusal.function else ""
    where = f" ({refusal.where})" if refusal.where else ""
    return f"Refused: {function}{_names(refusal.parameters)}{where}"


def _names(names: Sequence[str] | Iterable[str]) -> str:
    return ", ".join(name for name, _ in collapsed(list(names), lambda name: name))


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"
