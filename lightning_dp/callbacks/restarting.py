"""An optimizer that goes on with fewer parameters, as if it had been made for them.

Owns: what becomes of its groups, its state and its schedulers. Does not own: when that is, or which parameters stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from lightning_dp.errors import PrivacyConfigurationError

_IN_PROPORTION = (
    schedules.LambdaLR,
    schedules.MultiplicativeLR,
    schedules.StepLR,
    schedules.MultiStepLR,
    schedules.ConstantLR,
    schedules.LinearLR,
    schedules.ExponentialLR,
    schedules.PolynomialLR,
)
"""Schedules whose learning rate is always a multiple of the one that they began with."""

_IN_PROPORTION_TO_ZERO = {
    schedules.CosineAnnealingLR: "eta_min",
    schedules.CosineAnnealingWarmRestarts: "eta_min",
    schedules.ReduceLROnPlateau: "min_lrs",
}
"""Those for which this holds if they end at zero, and where they keep the end."""

_SEVERAL = (schedules.SequentialLR, schedules.ChainedScheduler)


def restart(optimizer: Optimizer, factor: float) -> None:
    """Leave out the parameters that are frozen by now, forget all state, and multiply the learning rates.

    The groups stay, even if nothing is left in one, since schedules count on their number.

    Args:
        optimizer: Changed in place: whoever holds it goes on with it.
        factor: Of the learning rates.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        for rate in group.keys() & {"lr", "initial_lr"}:
            group[rate] = group[rate] * factor


def rescale(scheduler: Any, factor: float) -> None:
    """Let a schedule go on from where it is, by multiplied learning rates.

    Args:
        scheduler: One that `check_proportional` has let pass, of an optimizer that was restarted by the same factor.
        factor: Of the learning rates.
    """
    for part in _parts(scheduler):
        for rates in vars(part).keys() & {"base_lrs", "_last_lr"}:
            setattr(part, rates, [rate * factor for rate in getattr(part, rates)])


def check_proportional(scheduler: Any, factor: float) -> None:
    """Raise if it is not clear what a multiplied learning rate is in a schedule.

    Raises:
        PrivacyConfigurationError: If it has rates of its own, beside a multiple of the one it began with.
    """
    for part in _parts(scheduler):
        end = getattr(part, _IN_PROPORTION_TO_ZERO.get(type(part), ""), None)
        ends_at_zero = end is not None and not any(end if isinstance(end, list) else [end])
        if type(part) in (*_IN_PROPORTION, *_SEVERAL) or ends_at_zero:
            continue
        raise PrivacyConfigurationError(
            f"learning_rate_factor={factor:g} with the scheduler {type(part).__name__}: it has learning rates of its "
            "own beside the optimizer's, and it is not clear which of them should change. Leave learning_rate_factor "
            "out and let the scheduler rise at the switch, or use one whose rate is always a multiple of the "
            "optimizer's, such as LambdaLR."
        )


def _parts(scheduler: Any) -> Iterator[Any]:
    """Return a scheduler and those that it is made of."""
    yield scheduler
    if type(scheduler) in _SEVERAL:
        for part in scheduler._schedulers:
            yield from _parts(part)
