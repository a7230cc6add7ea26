"""The runs of a random search on disk, until it has ended: their number, their scores, and the weights of the best.

Owns: what is kept while the search goes on, what is left of it, and that all runs have one mechanism. Does not own: how
a run is made (``fits``), what the search costs (``accounting.best_of``), or its loop (``random_search``).
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.accounting import Repetitions
from lightning_dp.accounting.phases import check_delta, check_target_epsilon
from lightning_dp.callbacks import PrivacyReport
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.tuning.fits import Run, check_automatic
from lightning_dp.tuning.history import SearchFile
from lightning_dp.tuning.scaling import log_uniform, search_range
from lightning_dp.tuning.scores import PrivateSelection
from lightning_dp.tuning.trials import check_mode, signed

BEST, PRESENT = "best.ckpt", "run"


@dataclass(frozen=True)
class RandomSearch:
    """All that a random search follows from; public, and fixed before its first run.

    Args:
        target_epsilon: Of the whole search, in nats.
        target_delta: In (0, 1).
        repetitions: The distribution of the number of runs.
        space: The least and the largest value of every hyper-parameter, above 0; its logarithm is drawn uniformly.
        monitor: Name of the validation metric that chooses.
        mode: Whether ``"max"`` or ``"min"`` of it is best.
        selection: How scores are paid for; ``None`` for public validation data.

    Raises:
        PrivacyConfigurationError: If a value is out of range.
    """

    target_epsilon: float
    target_delta: float
    repetitions: Repetitions
    space: Mapping[str, tuple[float, float]]
    monitor: str
    mode: str = "max"
    selection: PrivateSelection | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_target_epsilon(self.target_epsilon)
        check_delta("target_delta", self.target_delta)
        check_mode(self.mode)
        if not self.space:
            raise PrivacyConfigurationError("space={}: expected at least one hyper-parameter with its range.")
        object.__setattr__(self, "space", {name: search_range(name, values) for name, values in self.space.items()})

    def draw(self, rng: random.Random) -> list[dict[str, float]]:
        """Return the hyper-parameters of a random number of runs."""
        return [
            {name: log_uniform(rng, values) for name, values in self.space.items()}
            for _ in range(self.repetitions.draw(rng))
        ]


class Candidates(SearchFile):
    """The runs of a random search; those that lost are deleted.

    Guarantee: what a search leaves in its directory is the best run's, and the record of what was searched. Number and
    hyper-parameters of the runs are drawn once, by the operating system's random numbers; a search that was interrupted
    goes on with them. A run that had begun to release something when it was interrupted is not made again: it counts as
    one without a score, whatever interrupted it, and so costs nothing more.

    Args:
        directory: Of this search alone.
        search: What is searched for.
    """

    def __init__(self, directory: Path, search: RandomSearch) -> None:
        super().__init__(directory, search, {"settings", "scores", "mechanism", "best"})
        self._search = search

    def begin(self) -> None:
        """Draw the runs, or go on with those that were drawn.

        Raises:
            PrivacyConfigurationError: If the directory belongs to another search, or to a run that is none.
            PrivacyError: If the file cannot be read.
        """
        drawn = self.get()
        self._state = drawn or {"settings": self._search.draw(random.SystemRandom()), "scores": []}
        self._state = {"mechanism": None, "best": None, **self._state}
        self.put(self._state)

    def next(self) -> Run | None:
        """Return the run that comes next; ``None`` after the last one."""
        while self._state["best"] is None and self._num_made < len(self._state["settings"]):
            # The same folder for all of them: a checkpoint says where it was saved.
            folder = self.directory / PRESENT
            begun = self._folder(self._num_made).exists() or any(folder.glob("privacy-journal-*.json"))
            if not begun:
                folder.mkdir(exist_ok=True)
                values = self._state["settings"][self._num_made]
                return Run(values, {"num_sanity_val_steps": 0}, OneMechanism(self), folder / BEST, is_secret=True)
            self.end(math.nan)
        return None

    def end(self, score: float) -> None:
        """Keep the score of the run that `next` returned, and its weights if they are the best so far."""
        self._state["scores"].append(repr(score))  # JSON has no NaN
        if (self.directory / PRESENT).exists():
            (self.directory / PRESENT).rename(self._folder(self._num_made - 1))  # before the score is on disk
        self.put(self._state)
        for number in set(range(self._num_made)) - {self._best}:
            (self._folder(number) / BEST).unlink(missing_ok=True)

    def check_mechanism(self, mechanism: dict[str, Any]) -> None:
        """Raise if a run would have another mechanism than those before; keep it if it is the first.

        Raises:
            PrivacyConfigurationError: If noise, sample rate or steps are others.
        """
        before = self._state["mechanism"]
        if before not in (None, mechanism):
            changed = [f"{name}={value!r} (was {before[name]!r})" for name, value in mechanism.items()]
            raise PrivacyConfigurationError(
                f"a run of the search has {', '.join(changed)}: expected the same in all runs, which is what their "
                "bound is for. Search for what changes none of them, such as learning rate and weight decay."
            )
        self._state["mechanism"] = mechanism
        self.put(self._state)

    def close(self) -> dict[str, Any]:
        """Delete everything but the best run.

        Returns:
            Its ``values`` and ``score``, and the ``mechanism``.

        Raises:
            PrivacyError: If there is no best run.
        """
        if self._state["best"] is None:
            number = self._best
            if number is None:
                raise PrivacyError(
                    f"no run of the search has a number as {self._search.monitor!r}: nothing is released. Runs that "
                    "were interrupted have none, and Poisson's distribution may draw no run at all. What is in "
                    f"{str(self.directory)!r} is still private. Begin a new search, with a budget of its own."
                )
            if (self._folder(number) / BEST).exists():  # unless a search was interrupted here
                (self._folder(number) / BEST).replace(self.directory / BEST)
            best = {"values": self._state["settings"][number], "score": float(self._state["scores"][number])}
            self._state.update(best=best, settings=[], scores=[])
            self.put(self._state)
        for folder in [*self.directory.glob("run-*"), *self.directory.glob(PRESENT)]:
            shutil.rmtree(folder)
        return {**self._state["best"], "mechanism": self._state["mechanism"]}

    @property
    def _num_made(self) -> int:
        return len(self._state["scores"])

    @property
    def _best(self) -> int | None:
        """The first of the best: runs are alike, so that it does not matter which of equals it is."""
        scores = enumerate(map(float, self._state["scores"]))
        scored = [(number, signed(score, self._search.mode)) for number, score in scores if not math.isnan(score)]
        return max(scored, key=lambda one: one[1])[0] if scored else None

    def _folder(self, number: int) -> Path:
        return self.directory / f"run-{number}"


class OneMechanism(pl.Callback):
    """Refuses, before the first step, a run with another mechanism than the runs before it."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check."""
        check_automatic(pl_module)
        _check_silent(trainer)
        strategy: Any = trainer.strategy
        steps = strategy.budget.planned_steps
        mechanism = {"noise_multiplier": strategy.noise_multiplier, "sample_rate": strategy.sample_rate}
        self._candidates.check_mechanism({**mechanism, "num_steps": steps})


def _check_silent(trainer: pl.Trainer) -> None:
    """Raise if a run would leave a report: the search takes it out of the trainer's callbacks, not out of a module."""
    if any(isinstance(callback, PrivacyReport) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise PrivacyConfigurationError(
            "PrivacyReport from configure_callbacks() in a random search: it would keep a report of every run, and "
            "how many there are must stay unknown. Leave it out; `lightning-dp report` makes one of the best run."
        )
