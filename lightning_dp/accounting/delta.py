"""Which delta a number of units asks for.

Owns: the default and the bound. Does not own: what is done with it.
"""

from __future__ import annotations

from lightning_dp.accounting.phases import check_delta
from lightning_dp.errors import PrivacyConfigurationError


def delta_for(target_delta: float | None, num_units: int, unit: str = "example") -> float:
    """Return delta for N units: as given, else 1 / (10 N).

    Args:
        target_delta: In (0, 1/N), or ``None``.
        num_units: N.
        unit: What they are, for errors.

    Raises:
        PrivacyConfigurationError: If it is 1/N or more.
    """
    delta = 1 / (10 * num_units) if target_delta is None else check_delta("target_delta", target_delta)
    if delta >= 1 / num_units:
        raise PrivacyConfigurationError(
            f"target_delta={delta:g} with N={num_units} training {unit}s: expected less than 1/N = "
            f"{1 / num_units:g}, since a mechanism that publishes one random {unit} has delta = 1/N. "
            f"Try {1 / (10 * num_units):.1g}."
        )
    return delta
