"""How noise and batch size change over the steps of a run, fixed before the first of them.

Owns: which mechanism a step has. Does not own: the mechanism (``mechanism``), or what the steps cost (``accounting``).

Composition (arXiv 2106.02848, section 2) bounds what releases of different noise and rate tell together, in any order,
as long as noise and rate do not depend on what was released.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lightning_dp.accounting import Release
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism import Mechanism


@dataclass(frozen=True)
class Stage:
    """Some steps with noise and batch size of their own, as multiples of what the run has without a schedule.

    Args:
        num_steps: How many logical batches, at least 1; after the last stage its settings go on.
        noise_factor: Above 0: multiplies the noise multiplier, given or calibrated.
        batch_size_factor: Above 0: multiplies the expected batch size, and so the sample rate.

    Raises:
        PrivacyConfigurationError: If a value is not of that kind.
    """

    num_steps: int
    noise_factor: float = 1.0
    batch_size_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise PrivacyConfigurationError(f"num_steps={self.num_steps!r} of a stage: expected an integer >= 1.")
        for name in ("noise_factor", "batch_size_factor"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise PrivacyConfigurationError(f"{name}={value!r} of a stage: expected a finite number > 0.")


class Schedule:
    """The mechanism of every step.

    Guarantee: sampler, noise and accountant all ask here, by the number of the step, so they agree on every step.

    Args:
        base: The mechanism without a schedule.
        stages: In their order; none: the mechanism never changes.

    Raises:
        PrivacyConfigurationError: If a stage would sample with a probability above 1.
    """

    def __init__(self, base: Mechanism, stages: Sequence[Stage] = ()) -> None:
        self.base = base
        self._mechanisms = [base.scaled(stage.noise_factor, stage.batch_size_factor) for stage in stages] or [base]
        self._ends = list(accumulate(stage.num_steps for stage in stages))
        for stage, mechanism in zip(stages, self._mechanisms, strict=False):
            if mechanism.sample_rate > 1:
                raise PrivacyConfigurationError(
                    f"batch_size_factor={stage.batch_size_factor:g} of a stage: the sample rate would be "
                    f"{mechanism.sample_rate:.4g}, expected at most 1. Use at most {1 / base.sample_rate:.4g}."
                )

    def at(self, step: int) -> Mechanism:
        """Return the mechanism of a step, counted from 0 over the whole run."""
        last = len(self._mechanisms) - 1
        return self._mechanisms[min(bisect_right(self._ends, step), last) if last else 0]

    @property
    def mechanisms(self) -> Sequence[Mechanism]:
        """Those of all stages, in their order."""
        return self._mechanisms

    @property
    def varies(self) -> bool:
        """Whether the mechanism of a step depends on its number."""
        return len(set(self._mechanisms)) > 1

    @property
    def largest_rate(self) -> float:
        """The greatest sample rate of all steps."""
        return max(mechanism.sample_rate for mechanism in self._mechanisms)

    def releases(self, start: int, count: int) -> dict[Release, int]:
        """Return what the ledger will hold of ``count`` steps from ``start`` on."""
        releases: dict[Release, int] = {}
        end = start + count
        while start < end:
            following = bisect_right(self._ends, start)
            until = min(end, self._ends[following]) if following < len(self._mechanisms) - 1 else end
            release = self.at(start).release
            releases[release] = releases.get(release, 0) + until - start
            start = until
        return releases
