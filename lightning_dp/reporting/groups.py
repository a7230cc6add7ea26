"""What epsilon becomes for a person with several examples.

Owns: the choice between two ways. Does not own: the distributions (``numbers``), the accountants (``accounting``).

With dp-accounting: the mixture of Gaussians of k examples. Without: if one example has ``(e, d)``, then k have
``(k e, d (1 + exp(e) + ... + exp((k - 1) e)))``, from one neighbour to the next (Vadhan 2017, lemma 2.2, rounds this
sum up to ``k exp(k e)``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dp.accounting import Phase, resolve_accountant
from lightning_dp.reporting.numbers import pld_epsilon, reason_against

SIZES = (2, 4, 8)

MIXTURE, GROUP = "mixture of Gaussians (dp-accounting)", "group privacy (Renyi)"

# A smaller delta of one example is a bound that nobody can use, and that floats no longer resolve.
_LEAST_DELTA = 1e-200


@dataclass(frozen=True)
class GroupPrivacy:
    """What holds for adding or removing several examples together.

    Args:
        num_examples: How many.
        epsilon: An upper bound, in nats, at the delta of the report; ``None`` if there is no useful one.
        method: How it was found.
    """

    num_examples: int
    epsilon: float | None
    method: str


def group_privacy(phases: Sequence[Phase], delta: float) -> tuple[GroupPrivacy, ...]:
    """Return epsilon for groups of `SIZES`; nothing if there is no release, or one without noise.

    Args:
        phases: All releases.
        delta: In (0, 1).
    """
    if not phases or any(phase.noise_multiplier == 0 for phase in phases):
        return ()
    if reason_against(phases) is None:
        return tuple(GroupPrivacy(k, pld_epsilon(tuple(phases), delta, k), MIXTURE) for k in SIZES)
    return tuple(GroupPrivacy(k, group_epsilon(phases, delta, k), GROUP) for k in SIZES)


def group_epsilon(phases: Sequence[Phase], delta: float, num_examples: int) -> float | None:
    """Return k times the epsilon at the largest delta of one example that gives k examples at most ``delta``.

    The Renyi accountant is asked, as the fast one.

    Args:
        phases: All releases.
        delta: In (0, 1), of the group.
        num_examples: k.

    Returns:
        Epsilon in nats; ``None`` if not even a tiny delta of one example is enough.
    """
    accountant = resolve_accountant("rdp")

    def allowed(log_delta: float) -> bool:
        epsilon = accountant.epsilon(phases, math.exp(log_delta))
        return log_delta + _log_growth(epsilon, num_examples) <= math.log(delta)

    low, high = math.log(_LEAST_DELTA), math.log(delta)
    if not allowed(low):
        return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return num_examples * accountant.epsilon(phases, math.exp(low))


def _log_growth(epsilon: float, num_examples: int) -> float:
    """The logarithm of ``sum_{i < k} exp(i epsilon)``, which does not overflow."""
    highest = (num_examples - 1) * epsilon
    return highest + math.log(sum(math.exp(i * epsilon - highest) for i in range(num_examples)))
