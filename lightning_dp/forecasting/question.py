"""`forecast`: any two of target, noise and steps give the third.

Owns: what must be given, and what follows from it. Does not own: the searches (``accounting.calibration``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_dp.accounting import Accountant, calibrate_noise_multiplier, compute_epsilon, max_steps
from lightning_dp.accounting.delta import delta_for
from lightning_dp.accounting.phases import (
    check_count,
    check_delta,
    check_noise_multiplier,
    check_sample_rate,
    check_target_epsilon,
)
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.forecasting.result import Forecast


def forecast(
    *,
    num_examples: int | None = None,
    batch_size: int | None = None,
    sample_rate: float | None = None,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    target_delta: float | None = None,
    accountant: str | Accountant = "prv",
) -> Forecast:
    """Return what a budget comes to, from numbers alone: no model, no data, no training.

    Two of ``target_epsilon``, ``noise_multiplier`` and ``num_steps`` (or ``num_epochs``) give the third.

    Args:
        num_examples: N.
        batch_size: The expected size of a logical batch, at most N.
        sample_rate: Instead of both, or of ``batch_size``: in (0, 1].
        target_epsilon: In nats, above 0.
        noise_multiplier: Noise standard deviation divided by the sensitivity of the sum, above 0.
        num_steps: Logical batches, at least 1.
        num_epochs: Instead of ``num_steps``: passes, of as many batches as a dataloader has, the last one included.
        target_delta: In (0, 1), below 1/N; 1 / (10 N) by default.
        accountant: A name or an `Accountant`, as for ``DPStrategy``.

    Returns:
        The numbers; its tables are computed when they are asked for.

    Raises:
        PrivacyConfigurationError: If too little or too much is given, or a value is out of range.

    Example:
        >>> round(forecast(sample_rate=1.0, target_delta=1e-5, noise_multiplier=20.0, num_steps=100).epsilon or 0, 2)
        1.99
    """
    rate = _sample_rate(num_examples, batch_size, sample_rate)
    delta = _delta(target_delta, num_examples)
    steps = _num_steps(num_steps, num_epochs, rate)
    given = {"target_epsilon": target_epsilon, "noise_multiplier": noise_multiplier, "num_steps": steps}
    _check_two(given, "num_steps" if num_epochs is None else "num_epochs")
    if target_epsilon is not None:
        target_epsilon = check_target_epsilon(target_epsilon)
    if noise_multiplier is None:
        assert target_epsilon is not None, "two are given"
        noise = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=delta,
            sample_rate=rate,
            num_steps=steps or 0,
            accountant=accountant,
        )
    else:
        noise = _some_noise(noise_multiplier)
    if steps is None:
        assert target_epsilon is not None, "two are given"
        steps = _max_steps(target_epsilon, delta, noise, rate, accountant)
    return Forecast(
        sample_rate=rate,
        delta=delta,
        noise_multiplier=noise,
        num_steps=steps,
        target_epsilon=target_epsilon,
        num_examples=num_examples,
        accountant=accountant,
    )


def _sample_rate(num_examples: int | None, batch_size: int | None, sample_rate: float | None) -> float:
    """Return q, from itself or from batch size and N."""
    for name, value in (("num_examples", num_examples), ("batch_size", batch_size)):
        if value is not None and check_count(name, value) == 0:
            raise PrivacyConfigurationError(f"{name}=0: expected an integer of at least 1.")
    if sample_rate is not None and batch_size is not None:
        raise PrivacyConfigurationError(
            f"sample_rate={sample_rate} and batch_size={batch_size} are both given: expected sample_rate, or "
            "batch_size and num_examples. Leave out one of the two."
        )
    if sample_rate is not None:
        return check_sample_rate(sample_rate)
    if num_examples is None or batch_size is None:
        missing = " and ".join(n for n, v in (("num_examples", num_examples), ("batch_size", batch_size)) if v is None)
        raise PrivacyConfigurationError(
            f"the sample rate is not known: expected num_examples and batch_size, or sample_rate. Add {missing}."
        )
    if batch_size > num_examples:
        raise PrivacyConfigurationError(
            f"batch_size={batch_size} with num_examples={num_examples}: expected at most {num_examples}, as an example "
            "is in a logical batch once or not at all."
        )
    return batch_size / num_examples


def _delta(target_delta: float | None, num_examples: int | None) -> float:
    if num_examples is not None:
        return delta_for(target_delta, num_examples)
    if target_delta is None:
        raise PrivacyConfigurationError(
            "target_delta is not given, and sample_rate alone does not tell how many examples there are, which the "
            "default 1/(10 N) is for. Add target_delta or num_examples."
        )
    return check_delta("target_delta", target_delta)


def _num_steps(num_steps: int | None, num_epochs: int | None, rate: float) -> int | None:
    if num_steps is not None and num_epochs is not None:
        raise PrivacyConfigurationError(
            f"num_steps={num_steps} and num_epochs={num_epochs} are both given. Leave out one of them."
        )
    for name, value in (("num_steps", num_steps), ("num_epochs", num_epochs)):
        if value is not None and check_count(name, value) == 0:
            raise PrivacyConfigurationError(f"{name}=0: expected an integer of at least 1: nothing is released else.")
    if num_epochs is None:
        return num_steps
    return num_epochs * math.ceil(1 / rate - 1e-9)  # 1 / (1 / 49) is not quite 49


def _check_two(given: Mapping[str, object], steps: str) -> None:
    """Refuse anything but two given values, and say what to leave out or to add."""
    names = [steps if name == "num_steps" else name for name, value in given.items() if value is not None]
    if len(names) == 3:
        raise PrivacyConfigurationError(
            f"target_epsilon, noise_multiplier and {steps} are all given: any two of them give the third. Leave out "
            f"noise_multiplier to have it calibrated, target_epsilon to see what is spent, or {steps} to see how many "
            "steps fit."
        )
    if len(names) == 2:
        return
    others = {"target_epsilon": "target_epsilon", "noise_multiplier": "noise_multiplier", steps: "num_steps"}
    missing = " or ".join(name for at, name in others.items() if at not in names)
    told = f"only {names[0]} is given" if names else "none of target_epsilon, noise_multiplier and num_steps is given"
    raise PrivacyConfigurationError(
        f"{told}: two of target_epsilon, noise_multiplier and num_steps give the third. Add "
        f"{missing if names else 'two of them'} (num_epochs will do for num_steps)."
    )


def _some_noise(noise_multiplier: float) -> float:
    noise = check_noise_multiplier(noise_multiplier)
    if noise == 0:
        raise PrivacyConfigurationError(
            "noise_multiplier=0: without noise epsilon is infinite after the first step. Give a noise_multiplier above "
            "0, or leave it out to have it calibrated."
        )
    return noise


def _max_steps(target_epsilon: float, delta: float, noise: float, rate: float, accountant: str | Accountant) -> int:
    """Return how many steps fit, if at least one does."""
    steps = max_steps(
        target_epsilon=target_epsilon,
        target_delta=delta,
        noise_multiplier=noise,
        sample_rate=rate,
        accountant=accountant,
    )
    if steps:
        return steps
    first = compute_epsilon(noise_multiplier=noise, sample_rate=rate, num_steps=1, delta=delta, accountant=accountant)
    raise PrivacyConfigurationError(
        f"target_epsilon={target_epsilon:g} is too small for a single step with noise_multiplier={noise:g} at sample "
        f"rate {rate:.4g}, which spends epsilon {first:.4g} at delta {delta:.3g}. Give a larger noise_multiplier, or a "
        f"target_epsilon of at least {first:.4g}."
    )
