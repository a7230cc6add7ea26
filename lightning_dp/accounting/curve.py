"""Epsilon along a run, for displays that must not wait for an accountant.

Owns: a table of epsilons at a few numbers of steps, and looking one up. Does not own: any decision; the budget is
checked with the accountant itself (``calibration``).

Composition is subadditive (Dwork et al. 2006) and epsilon grows with every release, so the value at a later step,
``epsilon(n) <= epsilon(m)`` for ``n <= m``, is a bound for all steps before it.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.calibration import Histories, greatest_epsilon
from lightning_dp.accounting.phases import check_count


def epsilon_curve(
    accountant: Accountant,
    histories: Callable[[int], Histories],
    *,
    num_steps: int,
    delta: float,
    knots: int = 64,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Epsilon after a history and some further steps, at geometrically spaced numbers of steps.

    Args:
        accountant: Whose epsilon counts.
        histories: What units will have taken part in after so many further steps, earlier ones included.
        num_steps: The last knot, at least 0.
        delta: In (0, 1).
        knots: Number of knots at most, beside the first, which is 0.

    Returns:
        The numbers of further steps, increasing from 0, and the epsilon in nats at each.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.
    """
    last = check_count("num_steps", num_steps)
    spaced = np.geomspace(1, last, max(1, check_count("knots", knots))) if last else np.zeros(1)
    steps = tuple(sorted({0, last, *(round(float(step)) for step in spaced)}))
    return steps, tuple(greatest_epsilon(accountant, histories(n), delta) for n in steps)


class EpsilonTable:
    """Epsilon by number of further steps, looked up in no time: the value at the next knot, hence an upper bound.

    Interpolating between knots would lie below the truth, since epsilon is concave in the number of steps.

    Args:
        steps: Increasing numbers of further steps.
        epsilons: Epsilon at each, in nats.
    """

    def __init__(self, steps: Sequence[int], epsilons: Sequence[float]) -> None:
        """Keep both as tuples."""
        self._steps, self._epsilons = tuple(steps), tuple(epsilons)

    def at(self, num_steps: int) -> float:
        """An upper bound on epsilon after ``num_steps`` further steps; ``inf`` beyond the last knot."""
        position = bisect_left(self._steps, num_steps)
        return self._epsilons[position] if position < len(self._steps) else math.inf
