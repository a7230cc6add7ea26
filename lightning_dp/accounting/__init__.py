"""Accounting: what was released, and an upper bound on the epsilon it cost.

Owns: the ledger of releases, its journal on disk, the accountants, and the searches over them. Does not own: noise,
sampling or the decision to stop; nothing here knows PyTorch or Lightning.

The guarantee accounted for is ``P[M(D) in S] <= e^epsilon P[M(D') in S] + delta`` (Dwork et al. 2006) for data sets
that differ by one unit: an example, or a user. Reading order: ``phases``, ``releases``, ``base``, ``rdp``, ``losses``,
``prv``, ``pld``, ``fallback``, ``filter``, ``repetitions``, ``best_of``, ``cross_check``, ``claims``, ``calibration``,
``curve``, ``ledger``, ``journal``, ``reservation``, ``exact_count``, ``recovery``.
"""

from lightning_dp.accounting.accountants import resolve_accountant
from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.best_of import RDPBestOf
from lightning_dp.accounting.calibration import (
    Histories,
    calibrate,
    calibrate_noise_multiplier,
    compute_epsilon,
    greatest_epsilon,
    max_further_releases,
    max_steps,
)
from lightning_dp.accounting.claims import claim
from lightning_dp.accounting.cross_check import CrossChecked, cross_checked
from lightning_dp.accounting.curve import EpsilonTable, epsilon_curve
from lightning_dp.accounting.filter import RDPFilter
from lightning_dp.accounting.journal import Journal
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phases import Phase, merge_phases
from lightning_dp.accounting.pld import PLDAccountant
from lightning_dp.accounting.prv import PRVAccountant
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.accounting.recovery import journal_places
from lightning_dp.accounting.releases import Release, histories
from lightning_dp.accounting.repetitions import Repetitions
from lightning_dp.accounting.search import MAX_RELEASES

__all__ = [
    "MAX_RELEASES",
    "Accountant",
    "CrossChecked",
    "EpsilonTable",
    "Histories",
    "Journal",
    "Ledger",
    "PLDAccountant",
    "PRVAccountant",
    "Phase",
    "RDPAccountant",
    "RDPBestOf",
    "RDPFilter",
    "Release",
    "Repetitions",
    "calibrate",
    "calibrate_noise_multiplier",
    "claim",
    "compute_epsilon",
    "cross_checked",
    "epsilon_curve",
    "greatest_epsilon",
    "histories",
    "journal_places",
    "max_further_releases",
    "max_steps",
    "merge_phases",
    "resolve_accountant",
]
