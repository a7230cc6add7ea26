"""The result of a plan: pure data, about the model and the settings, never about what the training data contains."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_dp.bookkeeping.noting import Refusal
from lightning_dp.forecasting import Forecast
from lightning_dp.forecasting.improvement import Improvement


@dataclass(frozen=True)
class Covered:
    """One trained parameter, as the engine sees it.

    Args:
        name: Its name.
        shape: Its shape.
        functions: The torch functions that it enters, with the number of uses and what it was derived by.
        methods: How its per-sample norm is found.
        bytes_per_sample: What is held for it until its clipped sum is taken: what its functions save for the backward
            pass, and the entries.
        seconds: What finding its norms and its clipped sum took, for one physical batch; ``None`` if not measured.
    """

    name: str
    shape: tuple[int, ...]
    functions: tuple[str, ...]
    methods: tuple[str, ...]
    bytes_per_sample: float
    seconds: float | None = None


@dataclass(frozen=True)
class Coverage:
    """All trained parameters of a model.

    Args:
        covered: Those with a per-sample gradient.
        unused: The names of those that no gradient came back to: only noise would reach them.
        refused: The functions without an exact per-sample gradient.
        bytes_per_sample: What is held for all of them; tensors that several need are counted once.
    """

    covered: tuple[Covered, ...] = ()
    unused: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    bytes_per_sample: float = 0.0


@dataclass
class Plan:
    """What a private fit would do, as far as it can be told without training.

    Args:
        model: The class of the module.
        num_trained: Elements of the parameters that are trained.
        num_frozen: Elements of the parameters that do not require a gradient.
        frozen: How many parameters those are.
        untrained: The names of the parameters that require a gradient, but that no optimizer has.
        public: The names of the parameters that are trained without noise, since no example has a part in them.
        engine: ``"book"`` or ``"loop"``.
        num_examples: Of the training data; ``None`` here and below if the fit was refused before it was known.
        num_users: N, if the unit is a user with all their examples; ``None`` if it is an example.
        examples_per_user: How many examples of a drawn user are in a logical batch.
        views_per_example: How many rows of a batch each of them is.
        expected_batch_size: The expected number of examples in a logical batch.
        sample_rate: The probability of each unit to be in it.
        physical_batch_size: The most examples processed at a time, each view counted.
        physical_batch: Why this is the fastest, in a sentence; empty if it was not to be found.
        planned_steps: Logical batches that the trainer is set to make steps for in all; ``None`` without a limit.
        steps: How many more of them this fit uses: those planned that fit into ``target_epsilon``; ``None`` if endless.
        steps_per_batch: Optimizer steps in one training step: more than one only under manual optimization.
        clipping: The kind of clipping, with its settings.
        max_grad_norm: The largest L2 norm (not squared) of what one unit adds to a sum of gradients.
        noise_multiplier: Given or calibrated.
        epsilon: What all releases will have spent after ``steps`` more; ``None`` if endless.
        target_epsilon: The budget; ``None`` without one.
        delta: What epsilon is for.
        coverage: The parameters; ``None`` if the model could not be observed.
        self_check: The result of the self-check, in a sentence.
        time_ratio: Time of a private forward and backward pass with clipping, over that of an ordinary one, for
            ``timed_samples`` samples; ``None`` if it was not measured.
        timed_samples: How many samples were timed and weighed.
        forecast: The budget as data, its tables computed when they are asked for; ``None`` also without noise.
        public_steps: What public data does in the fit, in a sentence; empty if there is none.
        improvement: What a step improves, by batch size, estimated on public data; ``None`` unless it was asked for.
        errors: Why the fit is refused, apart from ``coverage.refused``; empty if it is not.
    """

    model: str
    num_trained: int = 0
    num_frozen: int = 0
    frozen: int = 0
    untrained: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    engine: str = "book"
    num_examples: int | None = None
    num_users: int | None = None
    examples_per_user: int = 1
    views_per_example: int = 1
    expected_batch_size: float | None = None
    sample_rate: float | None = None
    physical_batch_size: int | None = None
    physical_batch: str = ""
    planned_steps: int | None = None
    steps: int | None = None
    steps_per_batch: int = 1
    clipping: str = ""
    max_grad_norm: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    coverage: Coverage | None = None
    self_check: str = "not run"
    time_ratio: float | None = None
    timed_samples: int = 0
    forecast: Forecast | None = None
    public_steps: str = ""
    improvement: Improvement | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether a fit would end with an error before or in its first step."""
        return bool(self.errors or (self.coverage is not None and self.coverage.refused))
