"""The result of a forecast: numbers about a budget, and tables of what other numbers would give.

Owns: which questions the tables ask. Does not own: how one is answered (``search``) or shown (``tables``, ``figure``).

That the steps of a run add up to noise ``z sqrt(T)`` against a signal of ``b T``, with the noise multiplier z, the
expected batch size b and T steps, is the view of Sander et al. 2022 (arXiv 2210.03403): where z is large, epsilon
depends on hardly anything but ``sqrt(T) b / (N z)``. Ponomareva et al. 2023 (arXiv 2303.00654, section 5) advise larger
batches for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_dp.accounting import MAX_RELEASES, Accountant, Phase, resolve_accountant
from lightning_dp.forecasting.search import TOLERANCE, Answer, Question, answer_in_turn, quotient_at, side_by_side

_EPSILONS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
_STEP_POWERS, _BATCH_POWERS = range(-9, 2), range(-3, 5)
_NEAR_BEST = 1.05


@dataclass(frozen=True)
class AfterSteps:
    """What some steps spend.

    Args:
        num_steps: Further steps.
        epsilon: What they and all releases before them have spent, in nats.
    """

    num_steps: int
    epsilon: float


@dataclass(frozen=True)
class NoiseFor:
    """The noise with which the planned steps stay within another epsilon.

    Args:
        epsilon: In nats.
        noise_multiplier: With it they spend at most that, and at least 99 % of it if any noise does.
    """

    epsilon: float
    noise_multiplier: float


@dataclass(frozen=True)
class BatchOption:
    """Another batch size, with as many steps as draw equally many examples.

    Args:
        batch_size: Expected number of examples in a logical batch; ``None`` if N is not known.
        sample_rate: In (0, 1].
        num_steps: Steps.
        noise_multiplier: With it they spend the same epsilon.
    """

    batch_size: float | None
    sample_rate: float
    num_steps: int
    noise_multiplier: float

    @property
    def noise_per_step(self) -> float | None:
        """Standard deviation of the noise on a step's mean gradient over ``max_grad_norm``, or ``None`` without N."""
        return self.noise_multiplier / self.batch_size if self.batch_size else None

    @property
    def noise_per_run(self) -> float | None:
        """The same for the sum of all steps: noise grows with the root of their number, a signal with the number."""
        return self.noise_per_step / math.sqrt(self.num_steps) if self.noise_per_step is not None else None

    @property
    def noise_per_run_times_n(self) -> float:
        """`noise_per_run` times N, which is known without N."""
        return self.noise_multiplier / (self.sample_rate * math.sqrt(self.num_steps))


@dataclass(frozen=True)
class Forecast:
    """A budget before it is spent. The tables are computed when they are first asked for, in seconds.

    Guarantee: every epsilon is the accountant's upper bound, for adding or removing one example; see `Accountant`.

    Args:
        sample_rate: The probability of each example to be in a logical batch.
        delta: What epsilon is for.
        noise_multiplier: Of every release, above 0.
        num_steps: Logical batches that are still to come; ``None`` without a limit.
        target_epsilon: The budget, in nats; ``None`` without one.
        num_allowed: How many further steps fit into it; ``None`` if that was not asked for.
        num_examples: N, or the number of units that are no examples; ``None`` if only the sample rate is known.
        accountant: Whose epsilon counts: a name or an `Accountant`.
        spent: What was released before.
        after: Epsilon after so many further steps, in nats, of a fit with other releases than these numbers tell, such
            as those of a schedule; other settings are not compared then. ``None`` for a fit of one noise and rate.
        releases_per_draw: Noisy gradients released from one logical batch.
        unit: What is drawn, added or removed: ``"example"`` or ``"user"``.
    """

    sample_rate: float
    delta: float
    noise_multiplier: float
    num_steps: int | None
    target_epsilon: float | None = None
    num_allowed: int | None = None
    num_examples: int | None = None
    accountant: str | Accountant = "prv"
    spent: tuple[Phase, ...] = ()
    after: Callable[[int], float] | None = None
    releases_per_draw: int = 1
    unit: str = "example"

    @property
    def batch_size(self) -> float | None:
        """The expected number of examples in a logical batch; ``None`` if N is not known."""
        return None if self.num_examples is None else self.sample_rate * self.num_examples

    @cached_property
    def epsilon(self) -> float | None:
        """What everything has spent after ``num_steps``, in nats; ``None`` if they are endless."""
        return None if self.num_steps is None else self.epsilon_after(self.num_steps)

    @property
    def goal(self) -> float | None:
        """The epsilon that other settings are compared at: the target, or else what is spent in the end."""
        return self.epsilon if self.target_epsilon is None else self.target_epsilon

    def epsilon_after(self, num_steps: int) -> float:
        """Return what all releases so far and ``num_steps`` more have spent, in nats."""
        if self.after is not None:
            return self.after(num_steps)
        more = Phase(self._accounted_noise, self.sample_rate, num_steps)
        return resolve_accountant(self.accountant).epsilon([*self.spent, more], self.delta)

    @cached_property
    def after_steps(self) -> tuple[AfterSteps, ...]:
        """Epsilon at about a dozen numbers of steps, each twice the one before, up to twice the planned end."""
        ends = [end for end in (self.num_steps, self.num_allowed) if end and end < MAX_RELEASES]
        base = ends[0] if ends else math.ceil(1 / self.sample_rate)
        ladder = {min(MAX_RELEASES, round(base * 2.0**power)) for power in _STEP_POWERS}
        steps = sorted(step for step in ladder | set(ends) if step)
        return tuple(map(AfterSteps, steps, side_by_side(self.epsilon_after, steps)))

    @cached_property
    def noise_for(self) -> tuple[NoiseFor, ...]:
        """Noise for the planned steps at other epsilons; none if the noise was settled before or steps are endless."""
        goal, steps = self._comparable()
        if not goal:
            return ()
        epsilons = sorted({*_EPSILONS, goal})
        noises = self._noises([Question(epsilon, self.sample_rate, steps) for epsilon in epsilons])
        return tuple(map(NoiseFor, epsilons, noises))

    @cached_property
    def batches(self) -> tuple[BatchOption, ...]:
        """Batch sizes by factors of 2, up to all examples; none where `noise_for` has none."""
        goal, steps = self._comparable()
        if not goal:
            return ()
        work, rates = steps * self.sample_rate, self._rates(steps)
        questions = [Question(goal, rate, round(work / rate)) for rate in rates]
        sizes = [None if self.num_examples is None else rate * self.num_examples for rate in rates]
        counts = [question.num_steps for question in questions]
        return tuple(map(BatchOption, sizes, rates, counts, self._noises(questions)))

    @property
    def best_batch(self) -> BatchOption | None:
        """The smallest batch whose noise over the run is within 5 % of the least in `batches`."""
        least = min((option.noise_per_run_times_n for option in self.batches), default=0.0)
        return next((o for o in self.batches if o.noise_per_run_times_n <= _NEAR_BEST * least), None)

    @property
    def _accounted_noise(self) -> float:
        return self.noise_multiplier / math.sqrt(self.releases_per_draw)

    def _comparable(self) -> tuple[float, int]:
        """Return goal and steps that other settings can be compared at; a goal of 0 if there are none."""
        if self.spent or self.after is not None or not self.num_steps or not self.goal or self.goal == math.inf:
            return 0.0, 0
        return self.goal, self.num_steps

    def _rates(self, steps: int) -> list[float]:
        """Return the sample rates by factors of 2, for whole batch sizes if N is known, that leave a step at least."""
        unit = self.num_examples or 1
        rates = {self.sample_rate * 2.0**power for power in _BATCH_POWERS}
        if self.num_examples is not None:
            rates = {round(rate * unit) / unit for rate in rates if rate != self.sample_rate} | {self.sample_rate}
        return sorted(rate for rate in rates | {1.0} if 0 < rate <= min(1.0, steps * self.sample_rate))

    def _noises(self, questions: Sequence[Question]) -> list[float]:
        """Return a noise for every question, of which each is beside its neighbours."""
        assert self.num_steps is not None, "there is something to compare"
        own = Question(self.epsilon or _EPSILONS[0], self.sample_rate, self.num_steps)  # any place, if it is 0
        accountant, noise = resolve_accountant(self.accountant), self._accounted_noise
        known = Answer(noise, quotient_at(accountant, self.delta, noise, own))
        middle = min(range(len(questions)), key=lambda at: _distance(questions[at], own))
        is_answered = _is_answered(own, questions[middle])
        downwards, upwards = questions[: middle + (not is_answered)][::-1], questions[middle + 1 :]
        below, above = side_by_side(
            lambda chain: list(answer_in_turn(accountant, self.delta, chain, own, known)), [downwards, upwards]
        )
        answers = [*below[::-1], *([known] if is_answered else []), *above]
        return [math.sqrt(self.releases_per_draw) * answer.noise_multiplier for answer in answers]


def _distance(one: Question, other: Question) -> float:
    return abs(one.place - other.place)


def _is_answered(own: Question, question: Question) -> bool:
    """Whether the forecast's own noise answers a question."""
    same = (own.sample_rate, own.num_steps) == (question.sample_rate, question.num_steps)
    return same and (1 - TOLERANCE) * question.epsilon <= own.epsilon <= question.epsilon
