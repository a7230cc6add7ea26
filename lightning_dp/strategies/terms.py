"""The terms of a fit: what a resumed fit must keep, or change knowingly.

Owns: the comparison, and what of it is in a checkpoint. Does not own: what follows from a change (``settings``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dp.errors import PrivacyError
from lightning_dp.schedule import Stage


@dataclass(frozen=True)
class Terms:
    """What noise was calibrated for, or would have to be calibrated for.

    Args:
        num_units: Size of the training data.
        unit: ``"example"`` or ``"user"``.
        partition: Name of the data, if it has one.
        sample_rate: Without a schedule.
        delta: That epsilon is for.
        noise_multiplier: Of each release, without a schedule.
        schedule: Its stages.
        filter_target: The target of an adaptive accountant, in nats; ``None`` with any other one.
        filter_order: The Renyi order of a filter; ``None`` with any other accountant.
    """

    num_units: int
    unit: str
    partition: str | None
    sample_rate: float
    delta: float
    noise_multiplier: float
    schedule: tuple[Stage, ...] = ()
    filter_target: float | None = None
    filter_order: float | None = None

    def differences(self, before: Terms, *, noise_is_given: bool, delta_is_given: bool) -> list[str]:
        """Say what is other than before.

        Args:
            before: Earlier terms, of the same partition or of data that this one may have units in common with.
            noise_is_given: Whether the noise multiplier is the user's; otherwise it is the one from before.
            delta_is_given: Whether delta is the user's; otherwise it is at most the one from before.
        """
        found = [
            f"{words} is now {_shown(now)} and was {_shown(then)}"
            for words, now, then in (
                ("the size of the training data", self.num_units, before.num_units),
                ("the sample rate", self.sample_rate, before.sample_rate),
                *([("target_delta", self.delta, before.delta)] if delta_is_given else []),
                *([("noise_multiplier", self.noise_multiplier, before.noise_multiplier)] if noise_is_given else []),
            )
            if not math.isclose(now, then, rel_tol=1e-9)
        ]
        if self.partition != before.partition:
            found.append(f"the partition of the training data is now {self.partition!r} and was {before.partition!r}")
        return found + ["the schedule is another"] * (self.schedule != before.schedule)

    def state_dict(self) -> dict[str, Any]:
        """The terms as plain values."""
        return {**asdict(self), "schedule": [asdict(stage) for stage in self.schedule]}

    @classmethod
    def from_state(cls, state: Any) -> Terms:
        """What `state_dict` made.

        Raises:
            PrivacyError: If it is something else.
        """
        try:
            stages: Sequence[Mapping[str, Any]] = state["schedule"]
            return cls(**{**state, "schedule": tuple(Stage(**stage) for stage in stages)})
        except (TypeError, KeyError, ValueError) as error:
            raise PrivacyError(
                f"the terms of the fit in this checkpoint cannot be read ({error}): expected what this library wrote. "
                "Resume with the version that wrote it."
            ) from error


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
