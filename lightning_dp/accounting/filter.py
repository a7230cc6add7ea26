"""A privacy filter: noise and rate of every release may follow from all results before it.

Owns: the one Renyi order that is fixed beforehand, and its choice. Does not own: the divergences (``rdp``).

Feldman and Zrnic 2021 (arXiv 2008.11193), theorem 4.3, and Lecuyer 2021 (arXiv 2103.01379): if the divergences at one
order ``a``, each chosen with all earlier results in hand, never add up to more than ``B``, then all that was released
has Renyi divergence at most ``B`` at order ``a``. The number of releases may depend on the results too. The ordinary
accountants take the best order, or the whole distribution, of one sequence fixed beforehand: for a sequence that was
chosen on the way, that would be choosing by the results.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

from lightning_dp.accounting.base import Accountant, coarsened
from lightning_dp.accounting.phases import Phase, check_delta, check_target_epsilon, merge_phases
from lightning_dp.accounting.rdp import ORDERS, RDPAccountant, composed_divergences, conversion
from lightning_dp.errors import PrivacyConfigurationError


class RDPFilter(Accountant):
    """Renyi accounting at one order fixed before the first release: what comes next may depend on the results.

    Guarantee:
        As long as no release is made that would take ``epsilon(phases, delta)`` above ``target_epsilon``, everything
        released is ``(target_epsilon, delta)``-private, however noise, rate and end of the run were chosen.
        Preconditions (1) and (2) of :class:`Accountant`; target, delta and so the order do not depend on the data. A
        smaller epsilon on the way is what the filter has used up, not a guarantee of a run that its results ended.

    Args:
        order: One of ``rdp.ORDERS``; ``None`` for the one that suits a target, see :meth:`for_target`.

    Raises:
        PrivacyConfigurationError: If it is none of them.
    """

    name = "rdp_filter"
    most_kinds = RDPAccountant.most_kinds
    adaptive = True

    def __init__(self, order: float | None = None) -> None:
        self.order = None if order is None else _check_order(order)

    def for_target(self, target_epsilon: float, delta: float) -> Accountant:
        """The filter for a target: with the order given, else the one at which the largest divergence fits.

        Gaussian releases have divergence ``rho * a``: the order is that with the largest ``rho`` for which ``rho * a``
        and the conversion to epsilon make up the target. With the conversion ``log(1 / delta) / (a - 1)`` it would be
        ``1 + (L + sqrt(L (target_epsilon + L))) / target_epsilon``, ``L = log(1 / delta)``; the tighter one of ``rdp``
        gives a smaller order.

        Args:
            target_epsilon: In nats, above 0.
            delta: In (0, 1).

        Returns:
            The filter; it depends on the two numbers alone.

        Raises:
            PrivacyConfigurationError: If an argument is out of range.
        """
        target, delta = check_target_epsilon(target_epsilon), check_delta("delta", delta)
        if self.order is not None:
            return self
        return RDPFilter(float(ORDERS[np.argmax((target - conversion(delta)) / ORDERS)]))

    @classmethod
    def for_plan(cls, phases: Sequence[Phase], delta: float) -> "RDPFilter":
        """The filter at whose order a plan costs least: nothing is lost then as long as the run keeps near the plan.

        With small sample rates this order is far less than that of :meth:`for_target`, which knows no plan.

        Args:
            phases: What is planned, fixed before the first release. Keep ``order`` with the run: a resumed run must use
                the same, whatever it then plans.
            delta: In (0, 1).

        Returns:
            The filter.

        Raises:
            PrivacyConfigurationError: If nothing, or nothing private, is planned.
        """
        planned = merge_phases(phases)
        if not planned or any(phase.noise_multiplier == 0 for phase in planned):
            raise PrivacyConfigurationError(
                f"phases={tuple(phases)!r}: expected releases, all with noise, to plan for."
            )
        costs = composed_divergences(coarsened(planned, cls.most_kinds)) + conversion(check_delta("delta", delta))
        return cls(float(ORDERS[np.argmin(costs)]))

    def _epsilon(self, phases: tuple[Phase, ...], delta: float) -> float:
        if self.order is None:
            raise PrivacyConfigurationError(
                'accountant="rdp_filter" has no order yet: it is fixed by the target before the first release. Give '
                "target_epsilon, or take RDPFilter().for_target(target_epsilon, delta)."
            )
        index = int(np.flatnonzero(self.order == ORDERS)[0])
        return float(composed_divergences(phases)[index] + conversion(delta)[index])


def _check_order(order: object) -> float:
    """Return ``order`` as a float if it is one of the grid."""
    if isinstance(order, Real) and not isinstance(order, bool) and math.isfinite(order):
        nearest = float(ORDERS[np.argmin(np.abs(ORDERS - float(order)))])
        if nearest == order:
            return nearest
        expected = f"an order of rdp.ORDERS, such as {nearest:g}"
    else:
        expected = "a finite number > 1 of rdp.ORDERS"
    raise PrivacyConfigurationError(f"order={order!r}: expected {expected}.")
