"""What was measured, and the arithmetic on it.

Owns: medians, quartiles and ratios. Does not own: measuring (``race``), or how it is shown (``table``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from lightning_dp.benchmarking.baton import Facts, Step
from lightning_dp.benchmarking.machine import Machine
from lightning_dp.benchmarking.memory import Memory


@dataclass(frozen=True)
class Row:
    """One training.

    Args:
        name: What it is called.
        facts: What was known of it before its first step; ``None`` if it did not get so far.
        steps: Those that count, one for each round; empty if it was not measured.
        memory: Its peak; ``None`` if that is not known.
        note: Why it was not measured; empty if it was.
    """

    name: str
    facts: Facts | None
    steps: tuple[Step, ...]
    memory: Memory | None
    note: str = ""

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of an optimizer step."""
        return median(step.seconds for step in self.steps)

    @property
    def seconds_per_example(self) -> float:
        """Median seconds of an example."""
        return median(step.seconds_per_example for step in self.steps)

    @property
    def seconds_per_batch(self) -> float:
        """Median seconds of a full physical batch: of as many examples as it has."""
        assert self.facts is not None, "known before a step was measured"
        return self.seconds_per_example * self.facts.physical_batch_size


@dataclass(frozen=True)
class Ratio:
    """One training over another, step by step of the same round, by the time of an example.

    A logical batch of a Poisson sample has now more and now fewer examples, and its last physical batches are not full;
    so neither steps nor physical batches are alike, but examples are.

    Args:
        name: Of the one.
        other: Of the other.
        time: The median over the rounds.
        low: The lower quartile.
        high: The upper quartile.
        memory: Of the peaks above what was held before the model was built; ``None`` if not known.
    """

    name: str
    other: str
    time: float
    low: float
    high: float
    memory: float | None


@dataclass(frozen=True)
class Results:
    """All that a benchmark has to say.

    Args:
        title: What was trained.
        rows: The trainings.
        ratios: Their comparisons.
        machine: Where.
    """

    title: str
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    machine: Machine


def ratio_of(one: Row, other: Row) -> Ratio | None:
    """Compare two trainings that took turns.

    Args:
        one: The numerator.
        other: The denominator.

    Returns:
        The ratio; ``None`` if one of them was not measured.
    """
    if not one.steps or not other.steps:
        return None
    found = [a.seconds_per_example / b.seconds_per_example for a, b in zip(one.steps, other.steps, strict=True)]
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found
    return Ratio(one.name, other.name, median(found), low, high, _memory_ratio(one.memory, other.memory))


def ratios_of(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> tuple[Ratio, ...]:
    """Compare the pairs of trainings that were measured.

    Args:
        rows: The trainings.
        pairs: Their names: numerator and denominator.
    """
    named = {row.name: row for row in rows}
    found = [ratio_of(named[a], named[b]) for a, b in pairs if a in named and b in named]
    return tuple(ratio for ratio in found if ratio is not None)


def _memory_ratio(one: Memory | None, other: Memory | None) -> float | None:
    if one is None or other is None or other.for_training <= 0:
        return None
    return one.for_training / other.for_training
