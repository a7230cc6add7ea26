"""Train any LightningModule with differential privacy: add ``DPStrategy`` to the ``Trainer``."""

from lightning_dp.accounting import Repetitions, calibrate_noise_multiplier, compute_epsilon, max_steps
from lightning_dp.bookkeeping import register_rule
from lightning_dp.callbacks import (
    BiasOnlyFinetuning,
    PrivacyBudgetStopping,
    PrivacyMonitor,
    PrivacyReport,
    PublicPretraining,
)
from lightning_dp.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    NormClipping,
    PerLayerClipping,
    PSACClipping,
)
from lightning_dp.coverage import plan
from lightning_dp.data import PrivateDataset
from lightning_dp.errors import (
    PrivacyBudgetExceeded,
    PrivacyConfigurationError,
    PrivacyError,
    UnsupportedModelError,
)
from lightning_dp.forecasting import forecast
from lightning_dp.losses import per_sample_mean
from lightning_dp.missing_biases import add_missing_biases
from lightning_dp.optimizers import DPAdamBC
from lightning_dp.schedule import Stage
from lightning_dp.strategies import DPFSDPStrategy, DPStrategy
from lightning_dp.tuning import FrozenFeatures, LinearHead, PrivateSelection, SearchSpace, random_search, tune

__version__ = "0.1.0"

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "BiasOnlyFinetuning",
    "Clipping",
    "DPAdamBC",
    "DPFSDPStrategy",
    "DPStrategy",
    "FlatClipping",
    "FrozenFeatures",
    "LinearHead",
    "NormClipping",
    "PSACClipping",
    "PerLayerClipping",
    "PrivacyBudgetExceeded",
    "PrivacyBudgetStopping",
    "PrivacyConfigurationError",
    "PrivacyError",
    "PrivacyMonitor",
    "PrivacyReport",
    "PrivateDataset",
    "PrivateSelection",
    "PublicPretraining",
    "Repetitions",
    "SearchSpace",
    "Stage",
    "UnsupportedModelError",
    "add_missing_biases",
    "calibrate_noise_multiplier",
    "compute_epsilon",
    "forecast",
    "max_steps",
    "per_sample_mean",
    "plan",
    "random_search",
    "register_rule",
    "tune",
]
