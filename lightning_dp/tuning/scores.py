"""The score that chooses the best run of a search: by public validation data, or by private data that is paid for.

Owns: how a run is scored, and what that releases. Does not own: the choice (``trials``, ``candidates``) or the bound on
epsilon (``accounting``).

A score on private data is a release like any other: the Gaussian mechanism (Dwork and Roth 2014, theorem A.1) on a sum
to which each example adds a bounded value, in the same ledger as the steps of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_dp.accounting import Phase, Release
from lightning_dp.accounting.phases import check_noise_multiplier
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.noise import SecretRandom
from lightning_dp.strategies import DPStrategy


@dataclass(frozen=True)
class PrivateSelection:
    """Says that the validation data which chooses is private, and how its scores are paid for.

    The score of a run is a noisy mean over the N validation examples. The module is validated on each of them alone,
    and the metric is cut to the bounds: ``middle + (sum_i (v_i - middle) + noise) / N``, noise std
    ``noise_multiplier * (high - low) / 2``. N is taken as known, as that of the training data is.

    Guarantee: a score is booked in the ledger of the search before the run, as one release of this noise in which every
    example takes part, whether it is one of training or of validation. So both are within the target of the search.

    Args:
        noise_multiplier: Standard deviation of the noise, divided by what one example can change the sum by. More of it
            leaves more of the budget to the training; 1,000 examples and 20 make a standard error of 1 point of
            accuracy.
        bounds: The least and the largest value of the metric for one example; others are cut, and what is no number
            counts as the middle.

    Raises:
        PrivacyConfigurationError: If a value is out of range.
    """

    noise_multiplier: float = 20.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the values."""
        noise = check_noise_multiplier(self.noise_multiplier)
        if noise == 0:
            raise PrivacyConfigurationError("noise_multiplier=0 of PrivateSelection: expected noise, above 0.")
        bounds = tuple(self.bounds)
        if len(bounds) != 2 or not all(math.isfinite(bound) for bound in bounds) or not bounds[0] < bounds[1]:
            raise PrivacyConfigurationError(
                f"bounds={self.bounds} of PrivateSelection: expected two numbers, the least and a larger one, between "
                "which the metric of one example lies. For an accuracy (0.0, 1.0)."
            )
        object.__setattr__(self, "noise_multiplier", noise)
        object.__setattr__(self, "bounds", (float(bounds[0]), float(bounds[1])))

    @property
    def release(self) -> Release:
        """One score, for the ledger."""
        return Release(self.noise_multiplier, 1.0)

    @property
    def phase(self) -> Phase:
        """One score, for an accountant."""
        return self.release.times(1)

    def noisy_mean(self, values: Sequence[float], random: SecretRandom) -> float:
        """Return the score.

        Args:
            values: The metric of each validation example alone.
            random: Where the noise is drawn.
        """
        low, high = self.bounds
        middle, half = (low + high) / 2, (high - low) / 2
        cut = torch.tensor(values, dtype=torch.float64).clamp(low, high) - middle
        total = cut.nan_to_num(0.0).sum().view(1)
        random.add_normal([total], self.noise_multiplier * half)
        return middle + float(total) / len(values)


def resolve_selection(selection: str | PrivateSelection) -> PrivateSelection | None:
    """Return how scores are paid for; ``None`` if the validation data is said to be public.

    Raises:
        PrivacyConfigurationError: If neither is said.
    """
    if isinstance(selection, PrivateSelection):
        return selection
    if selection != "public":
        raise PrivacyConfigurationError(
            f"selection={selection!r}: expected 'public' or a PrivateSelection. Scores on private validation data that "
            "are not paid for would choose past the budget. Hold out public data of the same kind, or have noisy "
            "scores paid for: PrivateSelection(noise_multiplier=20)."
        )
    return None


def choice(private: bool) -> str:
    """Return the sentence of a result that says what chose."""
    if private:
        return "The validation data that chose is private: its noisy scores are part of this epsilon."
    return "The validation data that chose is public."


class Scores:
    """Scores the runs of a search.

    Args:
        monitor: Name of the validation metric.
        selection: How scores are paid for; ``None`` for public validation data.
    """

    def __init__(self, monitor: str, selection: PrivateSelection | None = None) -> None:
        self._monitor, self._selection, self._random = monitor, selection, SecretRandom()
        self._examples: list[DataLoader[Any]] = []

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, data: Mapping[str, Any]) -> None:
        """Find whatever is wrong with the validation before anything is spent.

        Args:
            trainer: Of the run.
            module: Not trained yet.
            data: Keyword arguments of ``validate``.

        Raises:
            PrivacyConfigurationError: If there is no such metric, or it cannot be paid for.
        """
        if self._selection is not None and trainer.loggers:
            raise PrivacyConfigurationError(
                f"logger={type(trainer.loggers[0]).__name__} in a search that private validation data chooses: it "
                "would keep exact scores. Use logger=False."
            )
        self._validate(trainer, module, data)
        if self._selection is not None:
            self._examples = _examples(trainer)

    def pay(self, strategy: DPStrategy) -> None:
        """Book the score of a run, before the run: its noise is then calibrated to what is left.

        Raises:
            PrivacyBudgetExceeded: If it does not fit.
        """
        if self._selection is not None:
            strategy._run.book_beside(self._selection.release)

    @contextmanager
    def unseen(self, trainer: pl.Trainer) -> Iterator[None]:
        """Keep private validation data out of the fit inside: only the score is paid for."""
        before = trainer.limit_val_batches
        if self._selection is not None:
            trainer.limit_val_batches = 0
        try:
            yield
        finally:
            trainer.limit_val_batches = before

    def score(self, trainer: pl.Trainer, module: pl.LightningModule, data: Mapping[str, Any]) -> float:
        """Return the score of a run that was checked; not a number if the metric of public data is none.

        Args:
            trainer: Of the run.
            module: Trained.
            data: Keyword arguments of ``validate``.
        """
        if self._selection is None:
            return self._validate(trainer, module, data)
        values = [self._validate(trainer, module, {"dataloaders": one}) for one in self._examples]
        return self._selection.noisy_mean(values, self._random)

    def _validate(self, trainer: pl.Trainer, module: pl.LightningModule, data: Mapping[str, Any]) -> float:
        trainer.validate(module, verbose=False, **data)
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            raise PrivacyConfigurationError(
                f"monitor={self._monitor!r}: validation logs {sorted(metrics) or 'nothing'}. Give the name of what is "
                "to choose, and log it in validation_step."
            )
        return float(metrics[self._monitor])


def _examples(trainer: pl.Trainer) -> list[DataLoader[Any]]:
    """Return a dataloader for each example of the data that was validated last.

    Alone, so that an example changes its own value only, whatever ``validation_step`` computes of a batch.
    """
    loader = trainer.val_dataloaders
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise PrivacyConfigurationError(
            f"the validation data of a PrivateSelection is a {type(loader).__name__}: expected one DataLoader over a "
            "dataset with a length, whose examples are scored one by one."
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if not size:
        raise PrivacyConfigurationError("the validation data of a PrivateSelection has no examples: expected some.")
    return [DataLoader(Subset(loader.dataset, [i]), collate_fn=loader.collate_fn) for i in range(size)]
