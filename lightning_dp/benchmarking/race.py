"""Whose turn it is.

Owns: the order of steps, and that only one training computes at a time. Does not own: what a training is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from lightning_dp.benchmarking.baton import Facts, Finished, Step, Token
from lightning_dp.benchmarking.child import BenchmarkError, Child, OutOfMemory, Training
from lightning_dp.benchmarking.result import Row

WARMUP = 3
"""Steps of each training that do not count: the model is looked at and checked, kernels are chosen, memory is found."""


@dataclass
class _Lane:
    name: str
    child: Child
    facts: Facts | None = None
    steps: list[Step] = field(default_factory=list)
    note: str = ""


class Race:
    """Trainings that take turns, each in a process of its own; all end with the ``with`` block.

    Args:
        warmup: How many steps of each do not count.
    """

    def __init__(self, warmup: int = WARMUP) -> None:
        self._warmup = warmup
        self._lanes: list[_Lane] = []
        self.turns: list[str] = []
        """Whose step it was, in the order of steps, the warm-up included."""

    def __enter__(self) -> Race:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            lane.child.close()

    def start(self, name: str, training: Training) -> Facts | None:
        """Start a training and let it make the steps that do not count, while all others wait.

        Args:
            name: What it is called.
            training: What it runs.

        Returns:
            What is known of it; ``None`` if it ran out of memory before its first step.

        Raises:
            BenchmarkError: If it failed; the others can go on without it.
        """
        lane = _Lane(name, Child(name, training))
        self._lanes.append(lane)
        try:
            lane.facts = lane.child.hear(Facts)
            for _ in range(self._warmup):
                self._step(lane)
            lane.child.tell(Token.RESET)
            lane.facts = lane.child.hear(Facts)
        except OutOfMemory:
            self._out_of_memory(lane)
        except BenchmarkError:
            _give_up(lane, "failed")
            raise
        return lane.facts

    def run(self, rounds: int) -> list[Row]:
        """Let every training make a step in each round, in turns.

        Args:
            rounds: How many steps of each count.

        Returns:
            What was measured, in the order in which they were started.

        Raises:
            BenchmarkError: If one failed.
        """
        for _ in range(rounds):
            for lane in self._lanes:
                if not lane.note:
                    try:
                        lane.steps.append(self._step(lane))
                    except OutOfMemory:
                        self._out_of_memory(lane)
        return [self._finished(lane) for lane in self._lanes]

    def _step(self, lane: _Lane) -> Step:
        self.turns.append(lane.name)
        lane.child.tell(Token.STEP)
        return lane.child.hear(Step)

    def _out_of_memory(self, lane: _Lane) -> None:
        others = sum(not other.note for other in self._lanes) - 1
        _give_up(lane, f"out of memory, beside {others} more" if others else "out of memory")

    def _finished(self, lane: _Lane) -> Row:
        if lane.note:
            return Row(lane.name, lane.facts, (), None, lane.note)
        lane.child.tell(Token.END)
        return Row(lane.name, lane.facts, tuple(lane.steps), lane.child.hear(Finished).memory)


def _give_up(lane: _Lane, why: str) -> None:
    """Leave a training out of all further rounds; what it holds goes to the others."""
    lane.note = why
    lane.child.close()
