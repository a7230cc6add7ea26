"""A report as Markdown.

Owns: the words and their order. Does not own: the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from lightning_dp.coverage.names import collapsed
from lightning_dp.record import Point, TrainingRecord
from lightning_dp.reporting.report import LedgerRow, Report
from lightning_dp.schedule import Stage

_HOW_TO_PLOT = "No figure: it needs matplotlib. `pip install 'lightning-dp[plot]'`, then make the report again."
_FACTS = ("fact", "value")
_SELF_CHECK = {
    "passed": "passed, on {} samples",
    "off": "off (self_check=False): that examples do not influence each other was not checked",
    "not needed": "not needed: in the loop every example is alone in its batch",
    "too few samples": "not run: it needs two different samples",
}


def as_markdown(report: Report, figure: str | None = "") -> str:
    """Return a report as Markdown.

    Args:
        report: What is shown.
        figure: The name of the figure beside it, without suffix; ``None`` if none can be drawn,
            empty if none is asked for.
    """
    parts = [
        "# Privacy report",
        *_flagged(report),
        _headline(report),
        *_guarantee(report),
        *_not_covered(report),
        *_mechanism(report),
        *_ledger(report),
        *_training(report),
        *_history(report, figure),
        *_versions(report),
    ]
    return "\n\n".join(parts) + "\n"


def _flagged(report: Report) -> Iterator[str]:
    for limit in report.not_covered:
        if limit.subject == "private statistics":
            yield f"**Not private as it stands.** {limit.text}"


def _headline(report: Report) -> str:
    privacy = report.privacy
    if math.isinf(privacy.epsilon):
        return "**This run is NOT private**: some releases have no noise, so epsilon is infinite."
    of_target = "" if privacy.target_epsilon is None else f" of {privacy.target_epsilon:g}"
    return (
        f"Training spent **epsilon {_epsilon(privacy.epsilon)}**{of_target} at delta {privacy.delta:.3g}, for adding "
        f"or removing one {privacy.unit}: an upper bound on what all noisy gradients that were released from "
        f"{privacy.num_releases:,} logical batches tell together."
    )


def _guarantee(report: Report) -> Iterator[str]:
    privacy = report.privacy
    yield "## Guarantee"
    rows = [
        ("epsilon spent", _epsilon(privacy.epsilon)),
        ("target epsilon", "none" if privacy.target_epsilon is None else f"{privacy.target_epsilon:g}"),
        ("delta", f"{privacy.delta:.3g}{' (default)' if privacy.target_delta is None else ''}"),
        ("holds for", f"{privacy.neighbouring} {privacy.unit}"),
        ("logical batches released from", f"{privacy.num_releases:,}"),
        ("steps left in the budget", _steps_left(report)),
        ("accountant", f"{privacy.accountant.name} ({privacy.accountant.library})"),
        ("second accountant", _cross_check(report)),
    ]
    if privacy.at_checkpoint is not None:
        at = privacy.at_checkpoint
        rows.append((f"known to {at.file} alone", f"epsilon {_epsilon(at.epsilon)}, {at.num_releases:,} releases"))
    yield _table(_FACTS, rows)
    yield privacy.claim
    if privacy.groups:
        yield "For a person with several examples in the training data, at the same delta:"
        groups = [
            (g.num_examples, "no useful bound" if g.epsilon is None else _epsilon(g.epsilon), g.method)
            for g in privacy.groups
        ]
        yield _table(("examples", "epsilon", "by"), groups)


def _steps_left(report: Report) -> str:
    privacy = report.privacy
    if privacy.steps_left is not None:
        return f"{privacy.steps_left:,}"
    return "no limit" if privacy.target_epsilon is None else "not known: more was released since, of several kinds"


def _cross_check(report: Report) -> str:
    check, epsilon = report.privacy.cross_check, report.privacy.epsilon
    if check.epsilon is None:
        return f"not asked: {check.reason}"
    text = f"epsilon {_epsilon(check.epsilon)} ({check.library}, from the ledger alone)"
    if check.epsilon > 1.01 * epsilon + 1e-3:
        return f"**{text}: more than the epsilon above. Rely on the larger one, and report this as a fault.**"
    return text


def _not_covered(report: Report) -> Iterator[str]:
    yield "## Not covered"
    yield "\n".join(f"- **{limit.subject}**: {limit.text}{_found(limit.found)}" for limit in report.not_covered)


def _found(names: Sequence[str]) -> str:
    return f" Found: {', '.join(f'`{name}`' for name in _short(names))}." if names else ""


def _mechanism(report: Report) -> Iterator[str]:
    mechanism, sampler = report.record.mechanism, report.record.sampler
    yield "## Mechanism"
    yield _table(
        _FACTS,
        [
            ("mechanism", "Gaussian noise on a clipped sum over a Poisson sample"),
            ("noise multiplier", f"{mechanism.noise_multiplier:.6g}"),
            ("clipping", f"{mechanism.clipping}, max_grad_norm {mechanism.max_grad_norm:g}"),
            ("sensitivity of the sum", f"{mechanism.sensitivity:g}"),
            ("expected batch size", f"{mechanism.expected_batch_size:g}"),
            ("sample rate", f"{mechanism.sample_rate:.6g}"),
            ("releases from one draw", mechanism.releases_per_draw),
            ("schedule", "; ".join(map(_stage, mechanism.schedule)) or "none: every step is alike"),
            ("sampler", f"{sampler.kind}, every {mechanism.unit} by itself"),
            ("training data", _data(report)),
            ("logical batches in an epoch", f"{sampler.batches_per_epoch:,}"),
            ("physical batch", f"at most {sampler.max_physical_batch_size:,} {mechanism.unit}s"),
        ],
    )


def _data(report: Report) -> str:
    sampler, unit = report.record.sampler, report.record.mechanism.unit
    users = f", N = {sampler.num_units:,} {unit}s, {sampler.examples_per_unit} examples of each one drawn"
    users = "" if unit == "example" else users
    views = f", each as {sampler.views_per_example} views" if sampler.views_per_example > 1 else ""
    of = f"{sampler.num_examples:,} examples of a `{sampler.dataset}`"
    return f"{'N = ' if unit == 'example' else ''}{of}{users}{views}"


def _ledger(report: Report) -> Iterator[str]:
    yield "## Ledger"
    yield "Every release, resumed fits included. All releases from one draw count as one with less noise."
    head = ("noise multiplier, as accounted", "sample rate", "releases", "from", "partition")
    yield _table(head, map(_row, report.ledger))


def _row(row: LedgerRow) -> tuple[str, ...]:
    size = "" if row.num_units is None else f"{row.num_units:,} "
    noise, rate = f"{row.noise_multiplier:.6g}", f"{row.sample_rate:.6g}"
    return noise, rate, f"{row.num_releases:,}", f"{size}{row.unit}s, {row.sampling}", row.partition or "none"


def _stage(stage: Stage) -> str:
    return f"{stage.num_steps:,} steps of noise ×{stage.noise_factor:g}, batch ×{stage.batch_size_factor:g}"


def _training(report: Report) -> Iterator[str]:
    yield "## Training"
    training = report.record.training
    if training is None:
        yield "No training step was looked at yet."
        return
    optimizers = ", ".join(f"{o.kind}{'' if o.private else ' (without noise)'}" for o in training.optimizers)
    check = training.self_check
    rows = [
        ("model", f"`{training.model}`"),
        ("optimization", f"{training.optimization}; {optimizers}"),
        ("per-sample gradients", {"book": "by book-keeping", "loop": "one by one"}[training.engine]),
        ("self-check", _SELF_CHECK[check.result].format(check.num_samples)),
    ]
    yield _table(_FACTS, rows)
    yield _parameters(training)


def _parameters(training: TrainingRecord) -> str:
    kinds = {
        "trained privately": training.trained,
        "trained without noise": training.public,
        "frozen": training.frozen,
        "not trained": training.untrained,
    }
    rows = [
        (f"`{name}`", "×".join(map(str, some[0].shape)) or "scalar", f"{sum(p.count for p in some):,}", kind)
        for kind, parameters in kinds.items()
        for name, some in collapsed(list(parameters), lambda p: p.name, lambda p: p.shape)
    ]
    return _table(("parameter", "shape", "elements", "how"), rows)


def _history(report: Report, figure: str | None) -> Iterator[str]:
    yield "## History"
    points = report.watched.history
    if points:
        names = sorted({name for point in points for name in point.metrics})
        head = ("event", "step", "releases", "epsilon", *names)
        yield _table(head, [_point(point, names) for point in points])
    else:
        yield "None was kept: the `PrivacyReport` callback keeps it, in checkpoints that hold more than weights."
    if figure is None:
        yield _HOW_TO_PLOT
    elif figure:
        yield f"![epsilon and validation metrics over steps]({figure}.png)"


def _point(point: Point, names: Iterable[str]) -> tuple[object, ...]:
    values = (point.metrics.get(name) for name in names)
    shown = ("" if value is None else f"{value:.4g}" for value in values)
    return point.event, point.step, point.num_releases, _epsilon(point.epsilon), *shown


def _versions(report: Report) -> Iterator[str]:
    yield "## Versions"
    yield ", ".join(f"{name} {version}" for name, version in report.record.versions.items())
    yield f"Recorded {report.record.recorded}, reported {report.created} (UTC)."


def _epsilon(value: float) -> str:
    """Rounded up: an upper bound stays one."""
    return "infinite" if math.isinf(value) else f"{math.ceil(value * 1e4) / 1e4:.4f}"


def _short(names: Sequence[str]) -> list[str]:
    return [name for name, _ in collapsed(list(names), lambda name: name)]


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; what was named by users must not break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
