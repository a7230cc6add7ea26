"""Which claim an epsilon supports, in words.

Owns: one sentence to be shown beside every epsilon. Does not own: the epsilon.

``P[M(D) in S] <= e^epsilon P[M(D') in S] + delta`` is a statement about a mechanism, not about one of its runs: it is
as good as the promise of what the mechanism would have done had the results been others. Rogers et al. 2016 (arXiv
1605.08294) call a bound that is fixed beforehand and never exceeded a filter, and a running count an odometer.
"""

from collections.abc import Sequence

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.phases import Phase, merge_phases

_ALWAYS = "for adding or removing one example, if every logical batch was a fresh Poisson sample"


def claim(phases: Sequence[Phase], accountant: Accountant) -> str:
    """What the epsilon of some releases says, and what it takes for granted.

    Args:
        phases: The releases made.
        accountant: Who accounted for them.

    Returns:
        One sentence for people.
    """
    merged = merge_phases(phases)
    if not merged:
        return "Nothing was released, so epsilon is 0."
    if any(phase.noise_multiplier == 0 for phase in merged):
        return "Something was released without noise, so there is no guarantee."
    if accountant.adaptive:
        return (
            f"The target epsilon and delta hold {_ALWAYS}, whatever results noise, sample rate and end of the run were "
            "chosen by; the smaller epsilon so far is what of the target is used up."
        )
    if len(merged) > 1:
        return (
            f"Epsilon and delta hold {_ALWAYS}, and if the {len(merged)} pairs of noise and sample rate and their "
            "numbers of releases were all fixed before the first release and not chosen by results."
        )
    return (
        f"The target epsilon and delta hold {_ALWAYS}, even if results decided to stop early; the smaller epsilon so "
        "far is the count at this point, and a guarantee of its own only if the number of releases was fixed before."
    )
