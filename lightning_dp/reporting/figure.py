"""The history of a run as a figure.

Owns: what is drawn. Does not own: the history.
"""

from __future__ import annotations

from typing import Any

from lightning_dp.plotting import new_figure
from lightning_dp.record import Point
from lightning_dp.reporting.report import Report


def draw(report: Report) -> Any:
    """Return a matplotlib figure of epsilon, validation metrics and, if there is one, the clipped share, over steps.

    Raises:
        PrivacyConfigurationError: If matplotlib is not installed.
    """
    history = report.watched.history
    names = sorted({name for point in history for name in point.metrics})
    shares = [point for point in history if point.clipped_share is not None]
    figure, axes = new_figure(1, 1 + bool(names) + bool(shares))
    _epsilon(axes[0], report)
    if names:
        for name in names:
            _line(axes[1], [(point, point.metrics.get(name)) for point in history], name)
        _label(axes[1], "validation", legend=True)
    if shares:
        _line(axes[-1], [(point, point.clipped_share) for point in shares], None)
        _label(axes[-1], "clipped share (not private)")
    return figure


def _epsilon(axis: Any, report: Report) -> None:
    # Steps that rise at their left edge: epsilon is concave, so a straight line would run below it.
    points = report.watched.history
    axis.plot([p.step for p in points], [p.epsilon for p in points], "o-", drawstyle="steps-pre", label="spent")
    target = report.privacy.target_epsilon
    if target is not None:
        axis.axhline(target, color="tab:red", linestyle="--", label="target_epsilon")
    axis.set_ylim(bottom=0)
    _label(axis, f"epsilon at delta {report.privacy.delta:.3g}", legend=bool(points) or target is not None)


def _line(axis: Any, values: list[tuple[Point, float | None]], name: str | None) -> None:
    known = [(point.step, value) for point, value in values if value is not None]
    axis.plot([step for step, _ in known], [value for _, value in known], "o-", label=name)


def _label(axis: Any, title: str, *, legend: bool = False) -> None:
    axis.set_xlabel("step")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend()
