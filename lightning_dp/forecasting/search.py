"""The noise that answers many questions alike, each with as few questions to the accountant as can be.

Owns: the search. Does not own: any bound on epsilon (``accounting``), nor the calibration of a fit
(``accounting.calibration``), which is closer and needs no neighbour.

The Renyi bound costs milliseconds and the accountant up to seconds, but their quotient hardly changes from a question
to one beside it. So the noise is found by the Renyi bound and the neighbour's quotient, and then only checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from lightning_dp.accounting import Accountant, Phase, RDPAccountant

Argument = TypeVar("Argument")
Result = TypeVar("Result")

TOLERANCE = 0.01
"""Epsilon of a noise that was found is between ``1 - TOLERANCE`` times what was asked for and that itself."""

# The Renyi bound is met so closely; a bracket of noises so narrow ends a search, as epsilon jumps in it; and less noise
# than this is never tried, since epsilon is 0 there only because the sample rate itself is below delta.
_CLOSE, _NARROW, _LEAST_NOISE = 0.002, 1e-4, 1e-3
# By how many per cent epsilon falls if the noise grows by one, to begin with; and what else is measured with.
_SLOPE, _STEP = 1.5, 1.01


@dataclass(frozen=True)
class Question:
    """Which noise lets so many steps at such a rate spend so much?

    Args:
        epsilon: In nats, above 0.
        sample_rate: In (0, 1].
        num_steps: At least 1.
    """

    epsilon: float
    sample_rate: float
    num_steps: int

    @property
    def place(self) -> float:
        """Where it is among questions that differ in epsilon only, or in the batch size only."""
        return math.log(self.epsilon) + math.log(self.sample_rate)


@dataclass(frozen=True)
class Answer:
    """A noise, and how far the Renyi bound was off there.

    Args:
        noise_multiplier: The noise.
        quotient: Logarithm of the accountant's epsilon over that of the Renyi bound.
    """

    noise_multiplier: float
    quotient: float


def answer_in_turn(
    accountant: Accountant, delta: float, questions: Iterable[Question], own: Question, known: Answer
) -> Iterator[Answer]:
    """Answer questions, each of which is beside the one before it.

    Args:
        accountant: Whose epsilon counts.
        delta: In (0, 1).
        questions: The questions.
        own: A question beside the first.
        known: Its answer.

    Guarantee: by the accountant, the epsilon of every noise is at most what was asked for. It is at least 99 % of that
    unless no noise of at least 0.001 gives that.
    """
    at, before, trend = own.place, known, 0.0
    for question in questions:
        far = question.place - at
        answer = _answer(accountant, delta, question, before.noise_multiplier, before.quotient + far * trend)
        trend = (answer.quotient - before.quotient) / far if far else 0.0
        at, before = question.place, answer
        yield answer


def quotient_at(accountant: Accountant, delta: float, noise: float, question: Question) -> float:
    """Return the logarithm of the accountant's epsilon over that of the Renyi bound, at a noise."""
    exact, renyi = (_epsilon(by, delta, question)(noise) for by in (accountant, RDPAccountant()))
    return math.log(exact / renyi) if min(exact, renyi) > 0 and max(exact, renyi) < math.inf else 0.0


def side_by_side(function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """Return the function of every argument; two at a time, as an accountant is mostly NumPy, which lets others run."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(function, arguments))


def _answer(accountant: Accountant, delta: float, question: Question, start: float, quotient: float) -> Answer:
    renyi, goal = _epsilon(RDPAccountant(), delta, question), question.epsilon
    aim = goal * (1 - TOLERANCE / 2) / math.exp(quotient)
    guess = _noise_between(renyi, aim * (1 - _CLOSE), aim * (1 + _CLOSE), start=start, slope=lambda: _SLOPE)
    exact = _epsilon(accountant, delta, question)
    noise = _noise_between(exact, goal * (1 - TOLERANCE), goal, start=guess, slope=lambda: _slope(renyi, guess))
    return Answer(noise, quotient_at(accountant, delta, noise, question))


def _epsilon(accountant: Accountant, delta: float, question: Question) -> Callable[[float], float]:
    return lambda noise: accountant.epsilon([Phase(noise, question.sample_rate, question.num_steps)], delta)


def _slope(epsilon: Callable[[float], float], noise: float) -> float:
    """Return by how many per cent epsilon falls if the noise grows by one."""
    here, beside = epsilon(noise), epsilon(_STEP * noise)
    return math.log(here / beside) / math.log(_STEP) if 0 < beside < here < math.inf else _SLOPE


def _noise_between(
    epsilon: Callable[[float], float], low: float, high: float, *, start: float, slope: Callable[[], float]
) -> float:
    """Return a noise with ``low <= epsilon(noise) <= high``; if there is none, about the least with the second."""
    less, more, guess, turn = 0.0, math.inf, max(start, _LEAST_NOISE), 0
    while not low <= (value := epsilon(guess)) <= high:
        turn += 1
        less, more = (guess, more) if value > high else (less, guess)
        if more <= max(_LEAST_NOISE, less * (1 + _NARROW)):
            return more
        factor = (value / math.sqrt(low * high)) ** (1 / slope()) if 0 < value < math.inf else 2.0 if value else 0.5
        guess *= min(4.0, max(0.25, factor))
        # Every third guess halves the bracket, in case epsilon jumps and the slope misleads.
        if not less < guess < more or turn % 3 == 0:
            guess = math.sqrt(less * more) if less > 0 and more < math.inf else 2 * less or more / 2
        guess = max(guess, _LEAST_NOISE)
    return guess
