"""Empty figures, for whoever draws: plans and reports.

Owns: the optional dependency on matplotlib. Does not own: what is drawn.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning_dp.errors import PrivacyConfigurationError


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    """Return an empty figure and its axes, row by row.

    It is not pyplot's: nothing global is touched and no display is needed.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.

    Raises:
        PrivacyConfigurationError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrivacyConfigurationError(
            "a plot needs matplotlib, which is not installed: pip install 'lightning-dp[plot]', or leave the plot out."
        ) from error
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())
