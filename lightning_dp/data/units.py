"""Units: what is sampled, clipped and protected as one.

Owns: which examples belong to a unit. Does not own: the draws (``poisson``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Units(ABC):
    """The units of a data set.

    Args:
        num_units: How many there are: N.
        partition: Name of the data; other names share no unit with it. ``None``: nothing is said of that.
    """

    unit: str
    """What a unit is: ``"example"`` or ``"user"``."""

    examples_per_unit: int = 1
    """How many rows of a batch each unit has."""

    def __init__(self, num_units: int, partition: str | None = None) -> None:
        self.num_units, self.partition = num_units, partition

    @abstractmethod
    def examples_of(self, units: Sequence[int]) -> list[int]:
        """Return the indices of the examples of these units, ``examples_per_unit`` of each, one unit after another."""


class ExampleUnits(Units):
    """Every example is a unit."""

    unit = "example"

    def examples_of(self, units: Sequence[int]) -> list[int]:
        """Return the units themselves."""
        return list(units)
