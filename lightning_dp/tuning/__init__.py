"""Hyper-parameter search with everything paid for: linear scaling of learning rate times steps (arXiv 2212.04486).

Owns: the division of a budget among the runs of a search, the extrapolation to the final run, and the search itself.
Does not own: the private steps of a run (``strategies``) or the bound on epsilon (``accounting``).
Reading order: ``shares``, ``scaling``, ``features``.
"""

from lightning_dp.tuning.features import FrozenFeatures, LinearHead
from lightning_dp.tuning.scaling import Line, SearchSpace, Setting
from lightning_dp.tuning.shares import SearchPlan, gaussian_mu

__all__ = ["FrozenFeatures", "Line", "LinearHead", "SearchPlan", "SearchSpace", "Setting", "gaussian_mu"]
