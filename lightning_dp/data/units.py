"""Units: what is sampled, clipped and protected as one.

Owns: which examples belong to a unit, and which of them take part in a step. Does not own: the draws of units
(``poisson``), or how a data set says whose its examples are (``private_dataset``).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_dp.noise import SecretRandom


class Units(ABC):
    """The units of a data set.

    Args:
        num_units: How many there are: N.
        partition: Name of the data; other names share no unit with it. ``None``: nothing is said of that.
        views: How many rows of a batch an example is: each is fetched anew, so that a random transform gives another
            view of it.
    """

    unit: str
    """What a unit is: ``"example"`` or ``"user"``."""

    examples_per_unit: int
    """How many rows of a batch each unit has, views included."""

    def __init__(self, num_units: int, partition: str | None = None, views: int = 1) -> None:
        self.num_units, self.partition, self.views = num_units, partition, views
        self.examples_per_unit = views

    def expected(self, batch_size: float) -> float:
        """Return how many units a dataloader's batch of so many examples is; the views of an example are one."""
        return batch_size * self.views / self.examples_per_unit

    @property
    def layout(self) -> str:
        """What tells which examples are a unit's from another division; empty if every example is one."""
        return ""

    @abstractmethod
    def examples_of(self, units: Sequence[int], random: SecretRandom | None = None) -> list[int]:
        """Return the indices of the examples of these units, ``examples_per_unit`` of each, one unit after another.

        Args:
            units: The units.
            random: Chooses among the examples of each; ``None`` for always the same ones.
        """


class ExampleUnits(Units):
    """Every example is a unit."""

    unit = "example"

    def examples_of(self, units: Sequence[int], random: SecretRandom | None = None) -> list[int]:
        """Return the units themselves, each as often as it has views."""
        return [unit for unit in units for _ in range(self.views)]


class UserUnits(Units):
    """Every user is a unit, with all their examples.

    Guarantee: what a unit gives to a batch is chosen from that user's own examples alone, and is always as many rows,
    so neither the rows nor the number of other users' rows depend on it.

    A user with k examples gives m rows: a random order of the k, gone through again and again up to m. With ``k >= m``
    that is a random subset without replacement; with less, each example comes ``m // k`` times, and ``m % k`` of them,
    chosen at random, once more.

    Args:
        users: The number of every example's user, counted from anywhere.
        examples_per_unit: m.
        partition: Name of the data.
        views: How many rows of a batch each of the m examples is.
    """

    unit = "user"

    def __init__(
        self, users: NDArray[np.int64], examples_per_unit: int, partition: str | None = None, views: int = 1
    ) -> None:
        _, counts = np.unique(users, return_counts=True)
        super().__init__(len(counts), partition, views)
        self.examples_per_unit, self._chosen = examples_per_unit * views, examples_per_unit
        self._examples = np.argsort(users, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def layout(self) -> str:
        """A digest of every user's examples."""
        return hashlib.sha256(self._examples.tobytes() + self._starts.tobytes()).hexdigest()

    def examples_of(self, units: Sequence[int], random: SecretRandom | None = None) -> list[int]:
        """Return m examples of each user, each as often as it has views."""
        return [int(e) for unit in units for e in self._some_of(unit, random) for _ in range(self.views)]

    def _some_of(self, unit: int, random: SecretRandom | None) -> NDArray[np.int64]:
        own = self._examples[self._starts[unit] : self._starts[unit + 1]]
        if random is not None:
            own = own[random.uniform(len(own)).argsort().numpy()]
        return np.resize(own, self._chosen)
