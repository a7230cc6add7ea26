"""Train any LightningModule with differential privacy: add ``DPStrategy`` to the ``Trainer``.

What is needed to reckon with a budget is imported at once, in about a second; what imports Lightning and torch, which
takes several, when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dp.accounting import calibrate_noise_multiplier, compute_epsilon, max_steps
from lightning_dp.errors import (
    PrivacyBudgetExceeded,
    PrivacyConfigurationError,
    PrivacyError,
    UnsupportedModelError,
)
from lightning_dp.forecasting import forecast

if TYPE_CHECKING:
    from lightning_dp.bookkeeping import register_rule
    from lightning_dp.callbacks import BiasOnlyFinetuning, PrivacyBudgetStopping, PrivacyMonitor
    from lightning_dp.coverage import plan
    from lightning_dp.losses import per_sample_mean
    from lightning_dp.strategies import DPStrategy

__version__ = "0.1.0"

__all__ = [
    "BiasOnlyFinetuning",
    "DPStrategy",
    "PrivacyBudgetExceeded",
    "PrivacyBudgetStopping",
    "PrivacyConfigurationError",
    "PrivacyError",
    "PrivacyMonitor",
    "UnsupportedModelError",
    "calibrate_noise_multiplier",
    "compute_epsilon",
    "forecast",
    "max_steps",
    "per_sample_mean",
    "plan",
    "register_rule",
]

_HOMES = {
    "BiasOnlyFinetuning": "callbacks",
    "DPStrategy": "strategies",
    "PrivacyBudgetStopping": "callbacks",
    "PrivacyMonitor": "callbacks",
    "per_sample_mean": "losses",
    "plan": "coverage",
    "register_rule": "bookkeeping",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
