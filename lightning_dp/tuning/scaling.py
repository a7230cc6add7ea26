"""Linear scaling: from what was best at small budgets to what is best at a large one.

Owns: the values that are tried, the line through the best ones, and the division of its value into a learning rate and
steps. Does not own: the runs (``search``) or what they cost (``shares``). Pure functions of numbers.

arXiv 2212.04486, section 3: with full batches, a run moves the weights by ``r = lr * num_steps`` times a mean gradient,
and noise by ``r / mu`` in all, however r is divided. The best r grows linearly with the run's epsilon:
``r(epsilon) = slope * epsilon + intercept``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dp.accounting.phases import check_count
from lightning_dp.errors import PrivacyConfigurationError


@dataclass(frozen=True)
class Setting:
    """What is searched for.

    Args:
        lr: Learning rate.
        num_steps: Steps of a run.
    """

    lr: float
    num_steps: int

    @property
    def r(self) -> float:
        """Learning rate times steps."""
        return self.lr * self.num_steps


@dataclass(frozen=True)
class SearchSpace:
    """Where settings are tried; public, and fixed before the first run.

    Args:
        lr: The least and the largest learning rate, above 0.
        num_steps: The least and the largest number of steps, at least 1.

    Raises:
        PrivacyConfigurationError: If a range is none.
    """

    lr: tuple[float, float] = (0.05, 2.0)
    num_steps: tuple[int, int] = (10, 100)

    def __post_init__(self) -> None:
        """Check the ranges."""
        object.__setattr__(self, "lr", search_range("lr", self.lr))
        object.__setattr__(self, "num_steps", search_range("num_steps", self.num_steps))
        for value in self.num_steps:
            check_count("num_steps", value)

    def draw(self, rng: random.Random) -> Setting:
        """A random setting: the logarithms of both are uniform."""
        steps = round(log_uniform(rng, self.num_steps))
        return Setting(log_uniform(rng, self.lr), steps)

    def divided(self, r: float) -> Setting:
        """The setting with this r whose learning rate and steps lie equally far up in their ranges, as logarithms.

        Args:
            r: Learning rate times steps; one outside of the space becomes the nearest inside.

        Returns:
            A setting within the space; its r is the given one but for rounding, and for an edge of the space.
        """
        (low, high), (fewest, most) = self.lr, self.num_steps
        least, largest = low * fewest, high * most
        if r <= least:
            return Setting(low, fewest)
        up = 1.0 if r >= largest else math.log(r / least) / math.log(largest / least)
        steps = round(fewest * (most / fewest) ** up)
        return Setting(min(high, max(low, r / steps)), steps)


@dataclass(frozen=True)
class Line:
    """``r(epsilon) = slope * epsilon + intercept``.

    Args:
        slope: At least 0.
        intercept: The value at 0.
    """

    slope: float
    intercept: float

    def __call__(self, epsilon: float) -> float:
        """The value at an epsilon."""
        return self.slope * epsilon + self.intercept

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """The line of least squares; through two points exactly.

        A falling line says that few runs were a bad measure, not that less budget allows more training: then the value
        at the largest epsilon is kept for all.

        Args:
            points: Pairs of a run's epsilon and its best r, for at least two different epsilons.

        Raises:
            PrivacyConfigurationError: If there are fewer.
        """
        if len({epsilon for epsilon, _ in points}) < 2:
            raise PrivacyConfigurationError(f"points={list(points)}: expected at least two different epsilons.")
        centre, mean = (math.fsum(values) / len(points) for values in zip(*points, strict=True))
        spread = math.fsum((epsilon - centre) ** 2 for epsilon, _ in points)
        slope = math.fsum((epsilon - centre) * (r - mean) for epsilon, r in points) / spread
        return cls(slope, mean - slope * centre) if slope >= 0 else cls(0.0, max(points)[1])


def search_range(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Return a range of positive numbers, the least first.

    Raises:
        PrivacyConfigurationError: If it is none.
    """
    pair = tuple(values)
    if len(pair) != 2 or not all(math.isfinite(value) and value > 0 for value in pair) or pair[0] > pair[1]:
        raise PrivacyConfigurationError(f"{name}={values!r} to search in: expected two numbers, 0 < least <= largest.")
    return pair


def log_uniform(rng: random.Random, within: tuple[float, float]) -> float:
    """A random number of a range, whose logarithm is uniform."""
    return math.exp(rng.uniform(*map(math.log, within)))
