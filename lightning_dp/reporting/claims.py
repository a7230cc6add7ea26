"""What the composed epsilon may be claimed for.

Owns: the sentence. Does not own: epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dp.accounting import Accountant, Phase


def claim(phases: Sequence[Phase], accountant: Accountant) -> str:
    """Return what epsilon of these releases holds for, and under which assumption.

    Args:
        phases: All releases.
        accountant: Whose epsilon counts.
    """
    if any(phase.noise_multiplier == 0 for phase in phases):
        return "Nothing is claimed: some releases have no noise."
    composed = (
        f"Epsilon is that of the composition of all releases, by the accountant '{accountant.name}'. It holds if the "
        "noise multiplier, the sample rate and the number of releases were fixed beforehand, or chosen without looking "
        "at anything that was released."
    )
    if len({phase.kind for phase in phases}) > 1:
        return composed
    return (
        f"{composed} All releases have one noise multiplier and one sample rate, so a fit that was stopped by what was "
        "released, within a target that was fixed beforehand, holds at least that target."
    )
