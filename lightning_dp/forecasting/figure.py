"""A forecast as a picture.

Owns: what is drawn. Does not own: the numbers, or matplotlib's empty figures (``plotting``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.forecasting.result import Forecast
from lightning_dp.plotting import new_figure

_LINE, _MARK, _TARGET = "#1f5f8b", "#c8553d", "#7a7a7a"


class ForecastFigure:
    """A figure that is refused before it is filled: tables take seconds, and a fit that is planned takes minutes.

    Args:
        path: Where it is saved; the ending tells the format.

    Raises:
        PrivacyConfigurationError: If matplotlib is missing, or it could not be saved there.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._figure, self._axes = new_figure(1, 3)
        formats = self._figure.canvas.get_supported_filetypes()
        if self._path.suffix[1:].lower() not in formats:
            raise PrivacyConfigurationError(
                f"plot={str(path)!r}: expected a file name that ends in one of .{', .'.join(sorted(formats))}."
            )
        if not self._path.parent.is_dir():
            raise PrivacyConfigurationError(f"plot={str(path)!r}: there is no directory {str(self._path.parent)!r}.")

    def save(self, forecast: Forecast) -> None:
        """Draw a forecast and save the figure."""
        _draw_steps(self._axes[0], forecast)
        _draw_noise(self._axes[1], forecast)
        _draw_batches(self._axes[2], forecast)
        self._figure.savefig(self._path, dpi=150)


def _draw_steps(axes: Any, forecast: Forecast) -> None:
    steps = [row.num_steps for row in forecast.after_steps]
    axes.plot(steps, [row.epsilon for row in forecast.after_steps], color=_LINE, marker=".")
    if forecast.target_epsilon is not None:
        axes.axhline(forecast.target_epsilon, color=_TARGET, linestyle="--", label="target")
    if forecast.num_steps is not None:
        label = f"planned: epsilon {forecast.epsilon:.3g}"
        axes.plot([forecast.num_steps], [forecast.epsilon], "o", color=_MARK, label=label)
    axes.set_ylim(bottom=0)
    _dress(axes, "Epsilon over the steps", "further steps" if forecast.spent else "steps", "epsilon")
    axes.set_xscale("log")


def _draw_noise(axes: Any, forecast: Forecast) -> None:
    if not _shows(axes, bool(forecast.noise_for)):
        return
    rows = forecast.noise_for
    axes.plot([row.epsilon for row in rows], [row.noise_multiplier for row in rows], color=_LINE, marker=".")
    here = next(row for row in rows if row.epsilon == forecast.goal)
    label = f"epsilon {here.epsilon:.3g}: noise {here.noise_multiplier:.3g}"
    axes.plot([here.epsilon], [here.noise_multiplier], "o", color=_MARK, label=label)
    axes.set_ylim(bottom=0)
    _dress(axes, f"Noise for {forecast.num_steps:,} steps", "epsilon", "noise multiplier")


def _draw_batches(axes: Any, forecast: Forecast) -> None:
    if not _shows(axes, bool(forecast.batches)):
        return
    known, least = forecast.num_examples is not None, min(o.noise_per_run_times_n for o in forecast.batches)
    points = [(o.batch_size if known else o.sample_rate, o.noise_per_run_times_n / least) for o in forecast.batches]
    axes.plot(*zip(*points, strict=True), color=_LINE, marker=".")
    for option, point in zip(forecast.batches, points, strict=True):
        if option.sample_rate == forecast.sample_rate:
            axes.plot(*point, "o", color=_TARGET, label=f"planned: {point[0]:,.4g}")
        if option == forecast.best_batch:
            axes.plot(*point, "o", color=_MARK, label=f"smallest within 5 %: {point[0]:,.4g}")
    axes.set_ylim(bottom=0)
    _dress(axes, "Noise over the run, same work", "batch size" if known else "sample rate", "relative to the least")
    axes.set_xscale("log")


def _shows(axes: Any, something: bool) -> bool:
    """Return whether there is something to show, and leave the axes empty if not."""
    if not something:
        axes.set_axis_off()
    return something


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)
