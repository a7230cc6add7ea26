"""What a release was: everything that must be known of it to say later what it cost, and whom it concerns.

Owns: :class:`Release`, and which releases one unit can have taken part in. Does not own: how many there were
(``ledger``), nor their epsilon (``base``).

A *unit* is what is added or removed between neighbouring data sets: one example, or one user with all of theirs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_dp.accounting.phases import (
    Phase,
    check_count,
    check_noise_multiplier,
    check_sample_rate,
    merge_phases,
)
from lightning_dp.errors import PrivacyConfigurationError

_UNITS, _SAMPLINGS = ("example", "user"), ("poisson",)


@dataclass(frozen=True)
class Release:
    """One noisy sum over a random part of a data set.

    Args:
        noise_multiplier: Noise standard deviation divided by the sensitivity of the sum; 0 means not private.
        sample_rate: Probability with which a unit enters the sum, in (0, 1].
        num_units: How many units the data set has; ``None`` if that was not recorded.
        unit: ``"example"`` or ``"user"``.
        partition: A name; data sets of different names are said to have no unit in common. ``None``: nothing is said.
        sampling: ``"poisson"``.

    Raises:
        PrivacyConfigurationError: If one of the values is not of that kind.
    """

    noise_multiplier: float
    sample_rate: float
    num_units: int | None = None
    unit: str = "example"
    partition: str | None = None
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        """Check the values and make them plain, which JSON and comparisons need."""
        object.__setattr__(self, "noise_multiplier", check_noise_multiplier(self.noise_multiplier))
        object.__setattr__(self, "sample_rate", check_sample_rate(self.sample_rate))
        if self.num_units is not None:
            object.__setattr__(self, "num_units", check_count("num_units", self.num_units))
        _check_choice("unit", self.unit, _UNITS)
        _check_choice("sampling", self.sampling, _SAMPLINGS)
        if self.partition is not None and (not isinstance(self.partition, str) or not self.partition):
            raise PrivacyConfigurationError(f"partition={self.partition!r}: expected a name, or None.")

    def times(self, num_releases: int) -> Phase:
        """What an accountant needs to know of so many of these."""
        return Phase(self.noise_multiplier, self.sample_rate, num_releases)

    def as_row(self, num_releases: int) -> dict[str, Any]:
        """So many of these, as plain values."""
        return {**asdict(self), "num_releases": num_releases}

    @classmethod
    def from_row(cls, row: object) -> tuple["Release", int]:
        """What :meth:`as_row` made.

        Raises:
            PrivacyConfigurationError: If it is something else.
        """
        names = {field.name for field in fields(cls)} | {"num_releases"}
        if not isinstance(row, Mapping) or set(row) != names:
            raise PrivacyConfigurationError(f"expected a mapping with the keys {sorted(names)}.")
        values = dict(row)
        count = check_count("num_releases", values.pop("num_releases"))
        return cls(**values), count


def histories(*counts: Mapping[Release, int]) -> tuple[tuple[Phase, ...], ...]:
    """What a unit can have taken part in: all releases without a partition, and those of one partition.

    Parallel composition (McSherry 2009, theorem 4): mechanisms on disjoint data sets cost the maximum, not the sum.
    Neighbouring data differ by one unit here, which is in one partition only.

    Args:
        *counts: How many releases there were of each kind, and how many more there will be.

    Returns:
        One sequence of phases for each partition, or one in all if none is named; epsilon is the greatest of theirs.
    """
    releases = [(release, n) for several in counts for release, n in several.items()]
    partitions: set[str | None] = {release.partition for release, _ in releases if release.partition is not None}
    return tuple(
        merge_phases(release.times(n) for release, n in releases if release.partition in (None, partition))
        for partition in sorted(partitions, key=str) or [None]
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PrivacyConfigurationError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}.")
