"""The budget of a fit, before its first step.

Owns: which numbers of a private run a forecast is made of. Does not own: the forecast (``forecasting``).
"""

from __future__ import annotations

from lightning_dp.forecasting import Forecast
from lightning_dp.strategies.run import PrivateRun


def forecast_of(run: PrivateRun, planned_left: int | None) -> Forecast | None:
    """Return what the budget of a fit comes to; nothing without noise.

    Args:
        run: The run, its mechanism and its budget settled.
        planned_left: Logical batches that the trainer is set to run from here; ``None`` without a limit.
    """
    assert run.mechanism is not None, "settled with the dataloader"
    if run.mechanism.noise_multiplier == 0:
        return None
    return Forecast(
        sample_rate=run.mechanism.sample_rate,
        delta=run.budget.delta,
        noise_multiplier=run.mechanism.noise_multiplier,
        num_steps=run.budget.releases_left if planned_left is None else planned_left,
        target_epsilon=run.budget.target_epsilon,
        num_allowed=run.budget.releases_left,
        num_examples=run.mechanism.num_units,
        unit=run.mechanism.unit,
        accountant=run.budget.accountant,
        spent=run.ledger.phases,
        after=run.budget.forecaster() if run.settings.schedule or run.ledger.num_releases else None,
        releases_per_draw=run.mechanism.releases_per_draw,
    )
