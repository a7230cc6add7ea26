"""What a random search costs: the best of a random number of runs is released, and nothing of the others.

Owns: the bound on epsilon of such a search, from the releases of one of its runs. Does not own: the distribution of
their number (``repetitions``), the divergences of one run (``rdp``), or the search (``tuning``).

Papernot and Steinke 2022 (arXiv 2110.03620), where one run has Renyi divergence ``R(a)`` at order ``a``, and K is the
number of runs. Theorem 2, K truncated negative binomial, for every order ``b >= 1``:
``R'(a) = R(a) + (1 + eta) (1 - 1/b) R(b) + (1 + eta) log(1/gamma) / b + log(E[K]) / (a - 1)``.
Theorem 6, K Poisson: ``R'(a) = R(a) + E[K] d + log(E[K]) / (a - 1)``, where one run is ``(e, d)``-private at
``e = log(1 + 1/(a - 1))``.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.phases import Phase
from lightning_dp.accounting.rdp import ORDERS, composed_divergences, conversion
from lightning_dp.accounting.repetitions import Repetitions

_NAME = re.compile(r"rdp_best_of\((\S+), (\S+)\)")


class RDPBestOf(Accountant):
    """Renyi accountant of a random search: phases are those of one run, epsilon is that of the whole search.

    Guarantee:
        That of :class:`Accountant` for whoever sees the best run, its hyper-parameters and its score, if (4) the number
        of runs was drawn from the distribution and is not known to them, nor anything of the other runs; (5) every run
        drew its hyper-parameters from one distribution; (6) no run made more releases, or other ones, than ``phases``;
        (7) which run is best follows from what the runs themselves put out, and public data. Releases made after the
        search, from the best run on, may be added to the phases: that costs at least what they do.

    Args:
        repetitions: The distribution of the number of runs.
    """

    def __init__(self, repetitions: Repetitions) -> None:
        self.repetitions, self.runs = repetitions, repetitions.mean
        self.name = f"rdp_best_of({repetitions.mean!r}, {repetitions.shape!r})"
        self.premise = (
            f", if this is the best of a random number of runs ({repetitions.mean:g} expected, shape "
            f"{repetitions.shape:g}), and neither that number nor anything of the other runs is known"
        )

    @classmethod
    def from_name(cls, name: str) -> RDPBestOf | None:
        """The accountant of this name, as reports and checkpoints have it; ``None`` if it is not one of these."""
        found = _NAME.fullmatch(name)
        try:
            return cls(Repetitions(*map(float, found.groups()))) if found else None
        except ValueError:
            return None

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        return float(np.min(selected_divergences(composed_divergences(phases), self.repetitions) + conversion(delta)))


def selected_divergences(one: npt.NDArray[np.float64], repetitions: Repetitions) -> npt.NDArray[np.float64]:
    """Renyi divergence of the best of so many runs, at every order of the grid.

    Args:
        one: Of one run, in nats, ``[orders]``.
        repetitions: The distribution of their number.

    Returns:
        Upper bounds in nats, ``[orders]``.
    """
    for_number = math.log(repetitions.mean) / (ORDERS - 1)
    if repetitions.is_poisson:
        deltas = np.exp(np.minimum(0.0, _log_deltas(one, np.log1p(1 / (ORDERS - 1)))))
        return np.asarray(one + repetitions.mean * deltas + for_number)
    at_best = np.min((1 - 1 / ORDERS) * one + repetitions.log_inverse_gamma / ORDERS)
    return np.asarray(one + (1 + repetitions.shape) * at_best + for_number)


def _log_deltas(one: npt.NDArray[np.float64], epsilons: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The logarithm of delta of one run at some epsilons: that conversion to epsilon, solved for delta."""
    by_order = (ORDERS - 1) * (one - epsilons[:, None] + np.log1p(-1 / ORDERS)) - np.log(ORDERS)
    return np.asarray(np.min(by_order, axis=1))
