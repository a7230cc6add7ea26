"""What to do where numbers cannot be trusted: ask the next engine, in the end the Renyi accountant.

Owns: the order in which engines are asked, and one line in the log for each way of failing. Does not own: any engine
(``prv``, ``pld``), nor the Renyi bound (``rdp``), which is a sum of positive terms (Mironov 2017, proposition 1:
``R_total(a) = sum_i R_i(a)``) and so has nothing to fail.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_dp.accounting.phases import Phase
from lightning_dp.accounting.rdp import RDPAccountant

logger = logging.getLogger("lightning_dp")

# What was said already: a search would say it a dozen times.
_said: set[tuple[object, ...]] = set()


class NumericsError(RuntimeError):
    """A numerical bound cannot be had, or is not to be trusted.

    Args:
        reason: In words that are the same for all inputs which fail so.
        details: The numbers of this input.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason} ({details})" if details else reason)
        self.reason = reason


class Engine(NamedTuple):
    """A numerical accountant: its name, and a function of phases and delta that may raise."""

    name: str
    epsilon: Callable[[tuple[Phase, ...], float], float]


def least_epsilon(phases: tuple[Phase, ...], delta: float, engines: Sequence[Engine]) -> float:
    """The lesser of the Renyi bound and that of the first engine whose numerics hold; the former alone if none do.

    Args:
        phases: Distinct, sorted, noisy.
        delta: In (0, 1).
        engines: In the order in which to ask them.

    Returns:
        An upper bound on epsilon, in nats.
    """
    renyi = RDPAccountant().epsilon(phases, delta)
    failures: list[tuple[str, Exception]] = []
    for engine in engines:
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused by the engines
                value = engine.epsilon(phases, delta)
        except (NumericsError, ArithmeticError, AssertionError, MemoryError, RuntimeError, ValueError) as error:
            failures.append((engine.name, error))
            continue
        answered = engine.name if value < renyi else RDPAccountant.name
        _say(failures, answered)
        return min(renyi, value)
    _say(failures, RDPAccountant.name)
    return renyi


def log_once(level: int, what: tuple[object, ...], message: str, *arguments: object) -> None:
    """Write a line to the log of ``lightning_dp``, the first time in this process that this is what it is about.

    Args:
        level: Of ``logging``.
        what: Tells lines apart.
        message: With placeholders.
        arguments: For the placeholders.
    """
    if what not in _said:
        _said.add(what)
        logger.log(level, message, *arguments)


def _say(failures: Sequence[tuple[str, Exception]], answered: str) -> None:
    """One line for each engine that failed, the first time that it fails so."""
    for name, error in failures:
        reason = error.reason if isinstance(error, NumericsError) else type(error).__name__
        log_once(
            logging.WARNING,
            ("fallback", name, reason, answered),
            'The accountant "%s" gave way to "%s", whose epsilon is an upper bound too: %s. This is said once.',
            name,
            answered,
            error,
        )
