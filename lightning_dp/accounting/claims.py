"""Which claim an epsilon supports, in words.

Owns: one sentence to be shown beside every epsilon. Does not own: the epsilon.

``P[M(D) in S] <= e^epsilon P[M(D') in S] + delta`` is a statement about a mechanism, not about one of its runs: it is
as good as the promise of what the mechanism would have done had the results been others. Rogers et al. 2016 (arXiv
1605.08294) call a bound that is fixed beforehand and never exceeded a filter, and a running count an odometer.
"""

from collections.abc import Sequence

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.phases import Phase, merge_phases

_ALWAYS = "for adding or removing one {unit}, if every logical batch was a fresh Poisson sample"
_KINDS = " and the noise and sample rate of every release were fixed before the first one, not chosen by results"


def claim(
    phases: Sequence[Phase],
    accountant: Accountant,
    *,
    target_epsilon: float | None = None,
    epsilon: float = 0.0,
    unit: str = "example",
) -> str:
    """What the epsilon of some releases says, and what it takes for granted.

    Args:
        phases: The releases made.
        accountant: Who accounted for them.
        target_epsilon: What they were never allowed to exceed, in nats; ``None`` for no limit.
        epsilon: What they have spent, in nats: a target below it, such as one that was lowered, is not claimed.
        unit: What is added or removed.

    Returns:
        A sentence for people, or two.
    """
    merged = merge_phases(phases)
    if not merged:
        return "Nothing was released, so epsilon is 0."
    if any(phase.noise_multiplier == 0 for phase in merged):
        return "Something was released without noise, so there is no guarantee."
    always, kinds = _ALWAYS.format(unit=unit) + accountant.premise, _KINDS if len(merged) > 1 else ""
    if target_epsilon is None or epsilon > target_epsilon:
        return f"Epsilon and delta hold {always}{kinds}, and if results did not decide when to stop."
    target = f"The target epsilon {target_epsilon:g} and delta hold {always}"
    if accountant.adaptive:
        return (
            f"{target}, whatever results the noise, the sample rate and the end of the run were chosen by. The smaller "
            "epsilon so far is what of the target is used up."
        )
    return (
        f"{target}{kinds}, even if results decided to stop early. The smaller epsilon so far is a guarantee of its own "
        "only if results did not decide when to stop."
    )
