"""The record of a run: plain facts, for reports and checkpoints.

Owns: which facts there are. Does not own: the finding of facts (``strategies.record``), their plain form (``plain``),
any number that follows from them, or any text (``reporting``).

Guarantee: every fact is a setting, a shape, a count that does not depend on what was drawn, or the outcome of the look
at the model before the first release. Sizes of draws, losses and gradients are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_dp.plain import VERSION
from lightning_dp.schedule import Stage


@dataclass(frozen=True)
class MechanismRecord:
    """The mechanism of the last fit.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the sensitivity.
        clipping: The kind of clipping, with its settings.
        max_grad_norm: The largest L2 norm (not squared) of what one unit adds to the sum; if the clipping moves it, at
            the time of the record.
        sensitivity: How far the sum can move when one unit is added or removed (L2 norm, not squared).
        expected_batch_size: What the noisy sum is divided by.
        sample_rate: The probability of each unit to be in a logical batch.
        releases_per_draw: Noisy gradients released from one logical batch.
        unit: What is added or removed: ``"example"`` or ``"user"``.
        schedule: How noise and batch size change over the steps, as multiples of the numbers above.
    """

    noise_multiplier: float
    clipping: str
    max_grad_norm: float
    sensitivity: float
    expected_batch_size: float
    sample_rate: float
    releases_per_draw: int
    unit: str = "example"
    schedule: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class SamplerRecord:
    """How logical batches were drawn in the last fit.

    Args:
        kind: The way of sampling.
        dataset: The class of the dataset.
        num_examples: How many examples it has; treated as public.
        num_units: N: how many units it has; the same number if every example is a unit.
        examples_per_unit: How many examples each unit in a logical batch gives.
        batches_per_epoch: Logical batches in an epoch.
        max_physical_batch_size: The most units that are processed at a time.
        views_per_example: How many rows of a batch each of these examples is.
    """

    kind: str
    dataset: str
    num_examples: int
    num_units: int
    examples_per_unit: int
    batches_per_epoch: int
    max_physical_batch_size: int
    views_per_example: int = 1


@dataclass(frozen=True)
class AccountingRecord:
    """What was asked, and how far it has come.

    Args:
        accountant: The name of the accountant.
        delta: What epsilon is for.
        target_epsilon: The budget, in nats; ``None`` without one.
        target_delta: As given; ``None`` if ``delta`` is the default.
        num_releases: Logical batches released from, in all.
        steps_left: How many more fit into the budget; ``None`` without one.
    """

    accountant: str
    delta: float
    target_epsilon: float | None
    target_delta: float | None
    num_releases: int
    steps_left: int | None


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter: its name, shape and number of elements."""

    name: str
    shape: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class OptimizerRecord:
    """An optimizer: its class, and whether it steps by noisy gradients."""

    kind: str
    private: bool


@dataclass(frozen=True)
class SelfCheckRecord:
    """How the self-check ended.

    Args:
        result: ``"passed"``, ``"off"``, ``"not needed"`` or ``"too few samples"``.
        num_samples: How many samples it looked at; 0 if it did not run.
    """

    result: str
    num_samples: int = 0


@dataclass(frozen=True)
class TrainingRecord:
    """What was trained, as found out before the first release.

    Args:
        model: The class of the module.
        engine: Where per-sample gradients came from: ``"book"`` or ``"loop"``.
        optimization: ``"automatic"`` or ``"manual"``.
        optimizers: In the order of ``configure_optimizers``.
        trained: The parameters that the guarantee is about.
        public: Those that were trained without noise, as no example took part in their gradients.
        frozen: Those that did not require a gradient.
        untrained: Those that required one, and that no optimizer had.
        self_check: How the self-check ended.
    """

    model: str
    engine: str
    optimization: str
    optimizers: tuple[OptimizerRecord, ...]
    trained: tuple[ParameterRecord, ...]
    public: tuple[ParameterRecord, ...]
    frozen: tuple[ParameterRecord, ...]
    untrained: tuple[ParameterRecord, ...]
    self_check: SelfCheckRecord


@dataclass(frozen=True)
class Record:
    """All facts about a run.

    Args:
        mechanism: Clipping and noise.
        sampler: The draws.
        accounting: The budget.
        training: ``None`` before the first training step.
        private_statistics: Whether statistics of gradients without noise are shown or logged.
        recorded: When, in UTC.
        versions: Of the libraries, by name.
        version: Of this form.
        public_mix: How steps were made on public data, too: the ``mix`` of `PublicPretraining`; empty if none were.
    """

    mechanism: MechanismRecord
    sampler: SamplerRecord
    accounting: AccountingRecord
    training: TrainingRecord | None
    private_statistics: bool
    recorded: str
    versions: dict[str, str]
    version: int = VERSION
    public_mix: str = ""


@dataclass(frozen=True)
class Point:
    """One point of the history.

    Args:
        event: ``"start"``, ``"validation"``, ``"end"``, ``"exception"`` or, last of all, ``"checkpoint"``.
        step: Optimizer steps so far.
        num_releases: Logical batches released from so far.
        epsilon: Spent so far, in nats.
        metrics: What validation logged, by name; ``None`` where it is not finite.
        clipped_share: Share of gradients that were clipped: not private, and only there if asked for.
    """

    event: str
    step: int
    num_releases: int
    epsilon: float
    metrics: dict[str, float | None] = field(default_factory=dict)
    clipped_share: float | None = None


@dataclass(frozen=True)
class Watched:
    """What a callback saw of a run.

    Args:
        history: In the order of time.
        training_metrics: Names that were logged while training, each with the hook that logged it.
        validation_metrics: Names that validation logged.
        hooks: The module's own hooks that ran around training steps.
        callbacks: The classes of the callbacks.
    """

    history: tuple[Point, ...] = ()
    training_metrics: tuple[str, ...] = ()
    validation_metrics: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
