"""The turn: a training waits before each step until it gets the baton, and says how long the step took.

Owns: the words that are exchanged, and the clock. Does not own: processes (``child``), or whose turn it is (``race``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection

import torch
from lightning.pytorch.utilities.exceptions import _TunerExitException

from lightning_dp.benchmarking.memory import Memory, PeakMemory


class Token(Enum):
    """What a training is told."""

    STEP = "make a step"
    RESET = "the warm-up is over: say what is known now, and measure memory from here"
    END = "say what you needed, and end"


@dataclass(frozen=True)
class Facts:
    """What is known of a training before its first step.

    Args:
        device: The name of the device, for torch.
        physical_batch_size: The most examples processed at a time.
        num_physical: Physical batches in a logical batch, as expected.
        num_trained: Parameters that are trained.
        num_parameters: All parameters.
    """

    device: str
    physical_batch_size: int
    num_physical: int
    num_trained: int
    num_parameters: int


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Args:
        seconds: From its turn to the moment before the next one: loading, Lightning and callbacks included.
        physical_batches: How many were processed.
        examples: How many were in them.
    """

    seconds: float
    physical_batches: int
    examples: int

    @property
    def seconds_per_example(self) -> float:
        """Seconds that one example took; a step of an empty draw counts as one of one example."""
        return self.seconds / max(1, self.examples)


@dataclass(frozen=True)
class Finished:
    """The last word of a training that was told to end."""

    memory: Memory | None


@dataclass(frozen=True)
class Failed:
    """The last word of any other.

    Args:
        reason: Why, with the traceback if it is an exception.
        out_of_memory: Whether that was all.
    """

    reason: str
    out_of_memory: bool = False


class Ended(_TunerExitException):
    """Ends a training; Lightning ends a fit by it without any hook but teardown, as its own tuner does."""


class Baton:
    """One training's end of the exchange.

    Args:
        connection: To the process that says whose turn it is.
        clock: Seconds.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float] = time.perf_counter) -> None:
        self._connection, self._clock = connection, clock
        self._memory, self._device = PeakMemory(), torch.device("cpu")
        self._began: float | None = None
        self._facts: Callable[[], Facts] | None = None
        self.has_ended = False

    def imports_done(self) -> None:
        """Say that what is held now is no part of training; the model is built next."""
        self._memory.note_level()

    def ready(self, facts: Callable[[], Facts]) -> None:
        """Say what is known before the first step.

        Args:
            facts: Returns it; asked once more after the warm-up, in which a physical batch size may be found.
        """
        self._facts = facts
        self._device = torch.device(facts().device)
        self._connection.send(facts())

    def wait(self, physical_batches: int = 0, examples: int = 0) -> None:
        """End a step, if one was begun, and wait for the next.

        Args:
            physical_batches: How many the step has processed.
            examples: How many were in them.

        Raises:
            Ended: If there is no next.
        """
        if self._began is not None:
            self._connection.send(Step(self._now() - self._began, physical_batches, examples))
        while (token := self._token()) is not Token.STEP:
            if token is Token.END:
                self._connection.send(Finished(self._memory.measured()))
                self.has_ended = True
                raise Ended
            assert self._facts is not None, "a training says that it is ready before its first step"
            self._memory.reset(self._device)
            self._connection.send(self._facts())
        self._began = self._now()

    def _token(self) -> Token:
        try:
            token: Token = self._connection.recv()
        except (EOFError, ConnectionError):  # whoever says whose turn it is has died
            self.has_ended = True
            raise Ended from None
        return token

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
