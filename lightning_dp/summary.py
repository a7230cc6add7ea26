"""The table at the end of a fit.

Owns: which numbers are shown, and how. Does not own: the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from lightning_dp.accounting import Release
from lightning_dp.strategies import PrivateStrategy

_UNITS = {"example": "training example", "user": "user with all their examples"}


def print_summary(strategy: PrivateStrategy, metrics: Mapping[str, float] | None = None) -> None:
    """Print what a private fit spent, and what it reached.

    Args:
        strategy: The strategy of the fit.
        metrics: Further rows, such as test metrics.
    """
    table = Table(title="Privacy summary", show_header=False, title_justify="left", caption_justify="left")
    table.caption = strategy.claim
    for name, value in {**_rows(strategy), **{name: f"{value:.4f}" for name, value in (metrics or {}).items()}}.items():
        table.add_row(name, value, style="bold" if name.startswith("epsilon") else None)
    Console().print(table)


def _rows(strategy: PrivateStrategy) -> dict[str, str]:
    target = strategy.budget.target_epsilon
    of_target = f" of {target:g}" if target is not None else ""
    return {
        "epsilon spent": f"{strategy.epsilon:.4f}{of_target}",
        "delta": f"{strategy.delta:.3g}",
        "steps (noisy releases)": f"{strategy.num_releases}",
        **(_kind(strategy) if _is_all_present(strategy) else _kinds(strategy.releases())),
        "holds for": f"adding or removing one {_UNITS[strategy.unit or 'example']}",
    }


def _is_all_present(strategy: PrivateStrategy) -> bool:
    """Whether every release was as the next one would be: after a stage of a schedule none needs to be."""
    mechanism = strategy._run.mechanism
    return mechanism is not None and strategy.releases().keys() <= {mechanism.release}


def _kind(strategy: PrivateStrategy) -> dict[str, str]:
    return {
        "noise multiplier": f"{strategy.noise_multiplier:.4g}",
        "sample rate": f"{strategy.sample_rate:.4g}",
    }


def _kinds(releases: Mapping[Release, int]) -> dict[str, str]:
    """One line for each noise and rate; several releases from one draw are one with less noise, as accounted."""
    lines = [f"{count} × {of.noise_multiplier:.4g} at {of.sample_rate:.4g}" for of, count in releases.items()]
    return {"steps × noise at sample rate": "\n".join(lines)}
