"""Hyper-parameter search with everything paid for: linear scaling of learning rate times steps (arXiv 2212.04486).

Owns: the division of a budget among the runs of a search, the extrapolation to the final run, and the search itself.
Does not own: the private steps of a run (``strategies``) or the bound on epsilon (``accounting``).
Reading order: ``tuner``, ``searching``, ``trials``, ``shares``, ``scaling``, ``fits``, ``history``, ``features``.
"""

from lightning_dp.tuning.features import FrozenFeatures, LinearHead
from lightning_dp.tuning.scaling import Line, SearchSpace, Setting
from lightning_dp.tuning.searching import TuningResult
from lightning_dp.tuning.shares import SearchPlan, gaussian_mu
from lightning_dp.tuning.trials import Outcome, Search
from lightning_dp.tuning.tuner import tune

__all__ = [
    "FrozenFeatures",
    "Line",
    "LinearHead",
    "Outcome",
    "Search",
    "SearchPlan",
    "SearchSpace",
    "Setting",
    "TuningResult",
    "gaussian_mu",
    "tune",
]
