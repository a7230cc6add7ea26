"""The arguments of a private strategy, checked.

Owns: the meaning of each argument: delta, sample rate, sizes, clipping, accountant. Does not own: the noise that
follows from all of them together (``fit_plan``), or the hooks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_dp.accounting import Accountant, resolve_accountant
from lightning_dp.accounting.delta import delta_for
from lightning_dp.clipping import Clipping, resolve_clipping
from lightning_dp.data import Units, largest_draw
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.schedule import Stage


@dataclass(frozen=True)
class PrivacySettings:
    """The arguments of ``DPStrategy``; see there.

    Raises:
        PrivacyConfigurationError: If an argument is not what it should be, naming it.
    """

    target_epsilon: float | None
    target_delta: float | None
    noise_multiplier: float | None
    max_grad_norm: float | None
    clipping: str | Clipping
    max_physical_batch_size: int | Literal["auto"] | None
    accountant: str | Accountant
    loss_reduction: str
    self_check: bool
    clipping_engine: str
    schedule: tuple[Stage, ...] = ()
    changed_settings: str = "refuse"
    private_statistics: bool = False

    def __post_init__(self) -> None:
        """Check the arguments that can be checked without model and data."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise PrivacyConfigurationError(
                "neither target_epsilon nor noise_multiplier is given: expected target_epsilon (the noise is then "
                "calibrated to the planned number of steps), noise_multiplier (epsilon is then reported), or both."
            )
        _check_number("target_epsilon", self.target_epsilon, "a positive number", 0, math.inf, low_open=True)
        _check_number("target_delta", self.target_delta, "a number between 0 and 1, below 1/N", 0, 1, low_open=True)
        _check_number("noise_multiplier", self.noise_multiplier, "a number of at least 0", 0, math.inf)
        if self.noise_multiplier == 0 and self.target_epsilon is not None:
            raise PrivacyConfigurationError(
                f"noise_multiplier=0 with target_epsilon={self.target_epsilon}: without noise epsilon is infinite. "
                "Leave out noise_multiplier to have it calibrated, or target_epsilon to run without privacy."
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise PrivacyConfigurationError(f"loss_reduction={self.loss_reduction!r}: expected 'mean' or 'sum'.")
        if self.clipping_engine not in ("book", "loop"):
            raise PrivacyConfigurationError(f"clipping_engine={self.clipping_engine!r}: expected 'book' or 'loop'.")
        if self.changed_settings not in ("refuse", "new_phase"):
            raise PrivacyConfigurationError(
                f"changed_settings={self.changed_settings!r}: expected 'refuse' or 'new_phase'."
            )
        for stage in self.schedule:
            if not isinstance(stage, Stage):
                raise PrivacyConfigurationError(f"schedule: {stage!r} is one of its stages, expected a Stage.")
        size = self.max_physical_batch_size
        number = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if size is not None and size != "auto" and not number:
            raise PrivacyConfigurationError(
                f"max_physical_batch_size={size!r}: expected a positive integer, 'auto' for the fastest that fits into "
                "memory, or None for the loader's batch_size."
            )
        self.resolved_clipping()
        if self.resolved_accountant().adaptive and self.target_epsilon is None:
            raise PrivacyConfigurationError(
                f"accountant={self.accountant!r} without target_epsilon: a filter is fixed by its target before the "
                "first release. Give target_epsilon."
            )

    @property
    def finds_size(self) -> bool:
        """Whether the physical batch size is to be found by measuring; the loop takes one sample at a time anyway."""
        return self.max_physical_batch_size == "auto" and self.clipping_engine == "book"

    @property
    def _most(self) -> int | None:
        """The most examples to process at a time, if the user said so."""
        return None if self.max_physical_batch_size == "auto" else self.max_physical_batch_size

    def physical_batch_size(self, batch_size: int, units: Units) -> int:
        """Return the most units to process at a time, for a dataloader of this batch size, as long as none is found.

        Raises:
            PrivacyConfigurationError: If not even one unit may be.
        """
        most, rows = self._most, units.examples_per_unit
        if most is not None and most < rows:
            raise PrivacyConfigurationError(
                f"max_physical_batch_size={most} with {_rows_of(units)}: they are clipped together, so they are in one "
                f"physical batch. Use at least {rows}, or fewer of them."
            )
        return 1 if self.clipping_engine == "loop" else max(1, (most or batch_size) // rows)

    def undivided_batch_size(self, units: Units, sample_rate: float, num_processes: int = 1) -> int:
        """Return how many units a batch has that holds a whole logical batch, as manual optimization needs it.

        Args:
            units: Of the training data.
            sample_rate: The largest one.
            num_processes: Share out a logical batch.

        Raises:
            PrivacyConfigurationError: If the settings divide logical batches.
        """
        draw = math.ceil(largest_draw(units.num_units, sample_rate) / num_processes)
        size = draw * units.examples_per_unit
        if self.clipping_engine == "loop" or (self._most or size) < size:
            limit = "clipping_engine='loop'"
            if self.clipping_engine == "book":
                limit = f"max_physical_batch_size={self.max_physical_batch_size}"
            raise PrivacyConfigurationError(
                f"{limit} with automatic_optimization=False: a training step that steps its optimizers itself runs on "
                f"a whole logical batch, of up to {size} samples here. Leave the setting out, or use automatic "
                "optimization."
            )
        return draw

    def facts(self) -> dict[str, Any]:
        """The arguments as values that can be compared between processes, by name."""
        return {field.name: _comparable(getattr(self, field.name)) for field in fields(self)}

    def resolved_clipping(self) -> Clipping:
        """Return the clipping that the arguments name."""
        return resolve_clipping(self.clipping, self.max_grad_norm)

    def resolved_accountant(self) -> Accountant:
        """Return the accountant that the arguments name."""
        return resolve_accountant(self.accountant)

    def accountant_for(self, delta: float) -> Accountant:
        """Return that accountant, with what it fixes by the target before the first release."""
        accountant = self.resolved_accountant()
        return accountant if self.target_epsilon is None else accountant.for_target(self.target_epsilon, delta)

    def delta(self, units: Units) -> float:
        """Return delta for N units: as given, else 1 / (10 N).

        Raises:
            PrivacyConfigurationError: If it is 1/N or more.
        """
        return delta_for(self.target_delta, units.num_units, units.unit)

    def sample_rate(self, units: Units, batch_size: int, world_size: int) -> float:
        """Return q for a dataloader whose batch size is the expected number of examples in one process.

        Raises:
            PrivacyConfigurationError: If it is above 1.
        """
        expected = units.expected(batch_size * world_size)
        if expected > units.num_units:
            most = units.num_units * units.examples_per_unit // (units.views * world_size)
            raise PrivacyConfigurationError(
                f"batch_size={batch_size} on {world_size} process(es) with N={units.num_units} training {units.unit}s: "
                f"the sample rate would be {expected / units.num_units:.3g}, expected at most 1. Use a batch_size of "
                f"at most {most}; the memory of a step is set by "
                "max_physical_batch_size."
            )
        return expected / units.num_units


def _comparable(value: object) -> object:
    """Return the value, or for an object its class and what it is made of, as far as that is plain."""
    if value is None or isinstance(value, str | int | float | tuple):
        return value
    kinds = (str, int, float, list, dict, tuple, type(None))
    plain = {k: repr(v) for k, v in sorted(vars(value).items()) if k[0] != "_" and isinstance(v, kinds)}
    return type(value).__qualname__, plain


def _rows_of(units: Units) -> str:
    own = units.examples_per_unit // units.views
    words = [f"examples_per_user={own}"] * (own > 1) + [f"views_per_example={units.views}"] * (units.views > 1)
    return " and ".join(words)


def _check_number(
    name: str, value: float | None, expected: str, low: float, high: float, *, low_open: bool = False
) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value >= high or (low_open and value == low):
        raise PrivacyConfigurationError(f"{name}={value!r}: expected {expected}.")
