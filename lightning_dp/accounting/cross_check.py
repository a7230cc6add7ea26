"""A second opinion on an epsilon: another library, another discretisation, another way to bound the tails.

Owns: when the second accountant is asked and what follows from a disagreement. Does not own: either bound.

Both are upper bounds on the same ``delta(epsilon) = sup_S P[M(D) in S] - e^epsilon P[M(D') in S]``, so neither can lie
above the other by more than the other's own grid error, unless one of them is no upper bound after all.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.fallback import NumericsError, log_once
from lightning_dp.accounting.gaussian import is_full
from lightning_dp.accounting.phases import Phase, check_delta, merge_phases
from lightning_dp.accounting.pld import FINE, PLDAccountant, composed_epsilon, dp_accounting_installed
from lightning_dp.accounting.prv import PRVAccountant

# The first look is on a grid so coarse, within about 0.2 %; a fine one is only needed if that exceeds the first bound.
_COARSE = 10.0
# A grid coarser than this says too little to be held against anyone.
_LEAST_FINENESS = 4.0
# What the fine grid may be above the truth, and so above the other bound, for no other reason: relative, absolute.
_TOLERANCE, _ABSOLUTE_TOLERANCE = 5e-3, 1e-4


class CrossChecked(Accountant):
    """An accountant whose epsilon is held against that of another: the larger one counts.

    Checked is ``"prv"``, by ``dp-accounting``'s privacy loss distributions if that is installed; every other accountant
    is passed on as it is. Nothing is checked in closed form, or where the second library's own numerics fail.

    Guarantee:
        That of the accountant, which may even be wrong as long as the second is not.

    Args:
        accountant: Whose epsilon is checked.
    """

    def __init__(self, accountant: Accountant) -> None:
        self._accountant = accountant
        self.name, self.adaptive, self.most_kinds = accountant.name, accountant.adaptive, accountant.most_kinds
        self.runs, self.premise = accountant.runs, accountant.premise
        self.checked = isinstance(accountant, PRVAccountant) and dp_accounting_installed()
        if isinstance(accountant, PRVAccountant) and not self.checked:
            _say_unchecked('dp-accounting is not installed (`pip install "lightning-dp[pld]"`)')

    def for_target(self, target_epsilon: float, delta: float) -> "CrossChecked":
        """The same check of the accountant for that target."""
        return CrossChecked(self._accountant.for_target(target_epsilon, delta))

    def values(self, phases: Sequence[Phase], delta: float) -> dict[str, float]:
        """Both epsilons of the same releases.

        Args:
            phases: Runs of equal releases, in any order.
            delta: In (0, 1).

        Returns:
            Epsilon in nats by name of accountant; one entry where there is nothing to compare.

        Raises:
            PrivacyConfigurationError: If ``delta`` does not lie in (0, 1).
        """
        first = self._accountant.epsilon(phases, delta)
        second = self._second(phases, check_delta("delta", delta), first)
        return {self.name: first} if second is None else {self.name: first, PLDAccountant.name: second}

    def trusted(self, phases: Sequence[Phase], delta: float, limit: float = math.inf) -> Accountant:
        """The accountant whose bound is to be used, by what both say of these releases.

        Args:
            phases: Such as those that a run plans.
            delta: In (0, 1).
            limit: The larger epsilon, which is the one to be reported, shall not exceed this.

        Returns:
            The accountant itself, or the second one if that says more than the grids explain, or than the limit.
        """
        values = self.values(phases, delta)
        first, second = values[self.name], values.get(PLDAccountant.name, 0.0)
        return PLDAccountant() if _disagree(first, second) or second > max(first, limit) else self._accountant

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        return max(self.values(phases, delta).values())

    def _second(self, phases: Sequence[Phase], delta: float, first: float) -> float | None:
        """The second epsilon, on no finer grid than it takes to see that the first is not below it."""
        merged = tuple(sorted(merge_phases(phases), key=lambda phase: phase.kind))
        if not self.checked or not 0 < first < math.inf or all(map(is_full, merged)):
            return None
        second = _resolved(merged, delta, _COARSE)
        if second is not None and second > first:
            second = _resolved(merged, delta, FINE)
        if second is not None and _disagree(first, second):
            log_once(
                logging.WARNING,
                ("disagree", merged, delta),
                'Two accountants disagree on epsilon at delta %g: "prv" says %.6g and "pld" %.6g, more than their '
                "grids explain. The larger one counts. Please report these releases: %s",
                delta,
                first,
                second,
                merged,
            )
        return second


def cross_checked(accountant: Accountant) -> CrossChecked:
    """The accountant with a second opinion, where there is one to be had.

    Args:
        accountant: Any; see :class:`CrossChecked` for which are checked.

    Returns:
        An accountant whose epsilon is the larger of both.
    """
    return accountant if isinstance(accountant, CrossChecked) else CrossChecked(accountant)


def _disagree(first: float, second: float) -> bool:
    """Whether the second bound is above the first by more than its grid explains."""
    return second > first * (1 + _TOLERANCE) + _ABSOLUTE_TOLERANCE


def _resolved(phases: tuple[Phase, ...], delta: float, fineness: float) -> float | None:
    """The second epsilon, if its grid is fine enough to be compared."""
    try:
        with np.errstate(all="ignore"):
            epsilon, had = composed_epsilon(phases, delta, fineness)
    except (NumericsError, ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        _say_unchecked(str(error))
        return None
    if had < _LEAST_FINENESS:
        _say_unchecked("only a coarse grid could be had")
        return None
    return epsilon


def _say_unchecked(reason: str) -> None:
    log_once(logging.INFO, ("unchecked", reason), 'The accountant "prv" is not checked by a second one: %s.', reason)
