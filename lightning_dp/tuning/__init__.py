"""Hyper-parameter search with everything paid for.

By linear scaling of learning rate times steps (arXiv 2212.04486), where every run has a share of the budget; and at
random with a random end (arXiv 2110.03620), where the best run alone is released.

Owns: the division of a budget among the runs of a search, the extrapolation to the final run, and the searches.
Does not own: the private steps of a run (``strategies``) or the bound on epsilon (``accounting``).
Reading order: ``tuner``, ``searching``, ``trials``, ``shares``, ``scaling``, ``fits``, ``scores``, ``history``,
``features``; then ``random_search``, ``candidates``.
"""

from lightning_dp.tuning.features import FrozenFeatures, LinearHead
from lightning_dp.tuning.random_search import RandomSearchResult
from lightning_dp.tuning.scaling import Line, SearchSpace, Setting
from lightning_dp.tuning.scores import PrivateSelection
from lightning_dp.tuning.searching import TuningResult
from lightning_dp.tuning.shares import SearchPlan, gaussian_mu
from lightning_dp.tuning.trials import Outcome, Search
from lightning_dp.tuning.tuner import random_search, tune

__all__ = [
    "FrozenFeatures",
    "Line",
    "LinearHead",
    "Outcome",
    "PrivateSelection",
    "RandomSearchResult",
    "Search",
    "SearchPlan",
    "SearchSpace",
    "Setting",
    "TuningResult",
    "gaussian_mu",
    "random_search",
    "tune",
]
