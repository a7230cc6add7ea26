"""`PrivateRun`: what a private fit consists of, whatever strategy drives it.

Owns: the coupling of sampler, mechanism, ledger and budget, and what of them goes into checkpoints. Does not own:
Lightning's hooks (``dp``) or per-sample gradients (``bookkeeping``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp.accounting import Ledger, Release, greatest_epsilon
from lightning_dp.budget import PrivacyBudget
from lightning_dp.clipping import AdaptiveClipping, Clipping
from lightning_dp.data import Drawn, ExampleUnits, PoissonLoader, Units, check_dataloader, units_of
from lightning_dp.errors import PrivacyBudgetExceeded, PrivacyError
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_statistics import PrivateStatistics
from lightning_dp.private_step import PrivateStep
from lightning_dp.processes import Processes
from lightning_dp.quantile_bound import QuantileBound
from lightning_dp.record import Record, TrainingRecord
from lightning_dp.schedule import Schedule
from lightning_dp.strategies.between import check_settings
from lightning_dp.strategies.fit_plan import FitPlan, present_terms
from lightning_dp.strategies.history import History
from lightning_dp.strategies.mixing import Mixing
from lightning_dp.strategies.planning import next_step, planned_steps
from lightning_dp.strategies.record import check_selected, earlier_record, plain_record, record_of
from lightning_dp.strategies.settings import PrivacySettings

_log = logging.getLogger("lightning_dp")

_CHECKPOINT_KEY = "lightning_dp"


class PrivateRun:
    """The state of a run: it outlives a single fit, so that several fits add up.

    Guarantee: there is one mechanism, so what is sampled, noised and accounted agree; the ledger only grows.

    Args:
        settings: The checked arguments of the strategy.
    """

    def __init__(self, settings: PrivacySettings) -> None:
        self.settings, self._history = settings, History()
        self.processes = Processes()
        self.is_lost = False  # whether processes that went on with it have ended without telling what they released
        self.loader: PoissonLoader | None = None
        self._user: DataLoader[object] | None = None
        self._units: Units = ExampleUnits(0)
        self._schedule: Schedule | None = None
        self._budget: PrivacyBudget | None = None
        self._releases_per_draw = 1
        self.training: TrainingRecord | None = None
        self._noise, self._sampling = SecretRandom(), SecretRandom()
        self.statistics = PrivateStatistics() if settings.private_statistics else None
        clipping = settings.resolved_clipping()
        self.bound = QuantileBound(clipping) if isinstance(clipping, AdaptiveClipping) else None
        self.mixing: Mixing | None = None  # set while a fit has public steps, too
        self.public_mix = ""  # of such fits, earlier ones included

    def join(self, processes: Processes) -> None:
        """Make every release together with other processes; each of them calls this, with the same run.

        All keep the same ledger and book alike. The first one decides upon noise and budget, and writes the journal.
        """
        self.processes = processes
        self._history.join(processes)

    @property
    def ledger(self) -> Ledger:
        """Everything that was released."""
        return self._history.ledger

    def __getstate__(self) -> dict[str, Any]:
        """Go into another process without what is of this one: the dataloaders and the other processes."""
        return {**self.__dict__, "processes": Processes(), "loader": None, "_user": None, "mixing": None}

    def take_over(self, other: PrivateRun) -> None:
        """Go on where a run is that another process has gone on with; what was released here counts, too."""
        other.ledger.merge(self.ledger.state_dict())
        self.__dict__.update(other.__dict__)

    def _check_known(self) -> None:
        if self.is_lost:
            raise PrivacyError(
                "a fit in other processes ended by an exception, and what it has released is not known in this one. "
                "Checkpoints and the journal beside them know: go on from the last one by fit(ckpt_path=...), with "
                "another DPStrategy."
            )

    @property
    def budget(self) -> PrivacyBudget:
        """The budget of the present fit.

        Raises:
            PrivacyError: Before the fit has seen its training data.
        """
        if self._budget is None:
            raise PrivacyError("the budget is known once a fit has seen its training data, and none has yet.")
        return self._budget

    @property
    def epsilon(self) -> float:
        """Epsilon spent by all releases so far.

        Raises:
            PrivacyError: If that is not known here.
        """
        self._check_known()
        return self.budget.epsilon if self.ledger.num_releases or self._budget else 0.0

    @property
    def delta(self) -> float | None:
        """The delta that epsilon is for, as far as it is known."""
        return self._budget.delta if self._budget else self.settings.target_delta

    @property
    def clipping(self) -> Clipping:
        """The clipping of the next step."""
        return self.settings.resolved_clipping() if self.bound is None else self.bound.clipping

    @property
    def schedule(self) -> Schedule:
        """The mechanisms of the present fit.

        Raises:
            PrivacyError: Before the fit has seen its training data.
        """
        if self._schedule is None:
            raise PrivacyError("noise and sample rate are known once a fit has seen its training data.")
        return self._schedule

    @property
    def mechanism(self) -> Mechanism | None:
        """The mechanism of the next step; ``None`` before the fit has seen its training data."""
        return self._schedule.at(self.budget.step) if self._schedule else None

    @property
    def batch_size(self) -> int:
        """The batch size of the user's dataloader: what is expected of a logical batch."""
        size = self._user.batch_size if self._user else None
        assert size is not None, "the dataloader comes first"
        return size

    def plan(self, dataloader: object, trainer: pl.Trainer, world_size: int) -> PoissonLoader:
        """Settle mechanism and budget for a train dataloader, and return the loader that samples it.

        Raises:
            PrivacyConfigurationError: If the dataloader, the settings and the trainer do not go together.
        """
        self._check_known()
        user = self._user = self.processes.together(lambda: check_dataloader(dataloader))
        units = self._units = self.processes.together(lambda: units_of(user.dataset))
        check_settings(self.processes, self.settings, user, units, trainer)
        if self.bound is not None:  # a checkpoint may be an older one on some disk
            self.bound.load_state_dict(self.processes.broadcast(self.bound.state_dict()))
        self._history.begin_fit()
        module, optimizers = trainer.lightning_module, len(trainer.strategy.optimizers)
        manual = not module.automatic_optimization
        known = self._releases_per_draw if manual else 1  # a resumed fit may have nothing left for as many
        self.settle(
            trainer, world_size, releases_per_draw=known, steps_per_draw=max(1, optimizers), announce=not manual
        )
        size = self.settings.physical_batch_size(user.batch_size or 1, units)
        if manual:
            size = self.settings.undivided_batch_size(units, self.schedule.largest_rate, self.processes.size)
        self.loader = PoissonLoader(
            user,
            units,
            sample_rate=lambda step: self.schedule.at(step).sample_rate,
            first_step=lambda: next_step(trainer),
            num_batches=len(user),
            max_physical_batch_size=size,
            random=self._sampling,
            constant_size=manual and optimizers > 1,
            processes=self.processes,
        )
        return self.loader

    def settle(
        self,
        trainer: pl.Trainer,
        world_size: int,
        *,
        releases_per_draw: int = 1,
        steps_per_draw: int = 1,
        announce: bool = True,
    ) -> None:
        """Settle mechanism and budget.

        Args:
            trainer: Gives the number of steps.
            world_size: Number of processes.
            releases_per_draw: Noisy gradients released from one logical batch.
            steps_per_draw: Optimizer steps in one training step, those without noise included.
            announce: Whether to say which noise was calibrated.
        """
        assert self._user is not None, "the dataloader comes first"
        settings = self.settings
        planned = planned_steps(trainer, len(self._user), steps_per_draw)
        step = next_step(trainer)
        if self.mixing is not None:  # public steps release nothing
            step, announce = self.mixing.first_private(step, planned), announce and self.mixing.is_settled
        rate = settings.sample_rate(self._units, self._user.batch_size or 0, world_size)
        terms = present_terms(settings, self._units, rate, self.ledger, self._history.agreed)
        planning = FitPlan(
            settings=settings,
            terms=terms,
            agreed=self._history.agreed,
            ledger=self.ledger,
            step=step,
            planned_steps=planned,
            releases_per_draw=releases_per_draw,
        )
        self._schedule, budget = self.processes.decide(lambda: planning.settled(self._history.journal))
        self._budget = budget.keep_in(self.ledger, self._history.journal)
        for mechanism in self._schedule.mechanisms:
            mechanism.check()
        self._history.settled = replace(terms, noise_multiplier=self._schedule.base.noise_multiplier)
        self._releases_per_draw = releases_per_draw
        if announce:
            base = self._schedule.base
            self._announce(base.noise_multiplier, planning.sentence(base, self._budget))

    def mechanism_of(self, drawn: Drawn) -> Mechanism:
        """Return the mechanism by which a logical batch is to be released.

        Raises:
            PrivacyError: If it was drawn by another one.
        """
        mechanism = self.schedule.at(drawn.step)
        if mechanism.sample_rate != drawn.sample_rate:
            raise PrivacyError(
                f"step {drawn.step} was drawn with sample rate {drawn.sample_rate:g} and would be accounted with "
                f"{mechanism.sample_rate:g}: the schedule has changed since. Begin another epoch first."
            )
        return mechanism

    def book(self, step: int) -> None:
        """Book what is released from one draw, in the budget of the present fit.

        Raises:
            PrivacyBudgetExceeded: If it does not fit.
        """
        self.budget.book(step)

    def book_beside(self, release: Release) -> None:
        """Book something that is released beside the steps, before it is made.

        Args:
            release: What it is.

        Raises:
            PrivacyBudgetExceeded: If it does not fit into the target.
        """
        target, delta = self.settings.target_epsilon, self.delta
        assert target is not None, "a search has one"
        assert delta is not None, "a search has one"
        epsilon = greatest_epsilon(self.settings.accountant_for(delta), self.ledger.histories({release: 1}), delta)
        if epsilon > target:
            raise PrivacyBudgetExceeded(
                f"a release with noise_multiplier={release.noise_multiplier:g} beside the steps would exceed "
                f"target_epsilon={target:g}: with it, epsilon is {epsilon:.4g} at delta {delta:g}. Use more noise for "
                "it, or a larger target_epsilon."
            )
        self._history.journal.reserve(self.ledger, release, block=1)
        self.ledger.book(release)

    def _announce(self, noise_multiplier: float, calibrated: str) -> None:
        if noise_multiplier == 0 and self.processes.is_first:
            _log.warning("noise_multiplier=0: this run is NOT private, its epsilon is infinite.")
        if calibrated:
            rank_zero_info(calibrated)

    def private_step(self, trained: Mapping[str, nn.Parameter]) -> PrivateStep:
        """Return the buffers for these parameters."""
        mean_loss = self.settings.loss_reduction == "mean"
        return PrivateStep(
            trained,
            self._noise,
            mean_loss=mean_loss,
            statistics=self.statistics,
            bound=self.bound,
            processes=self.processes,
        )

    def put_into(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Put the ledger into a checkpoint that is about to be saved, and where its journal will be."""
        bound = {} if self.bound is None else {"bound": self.bound.state_dict()}
        checkpoint[_CHECKPOINT_KEY] = {"version": 2, **self._history.state(path), **bound, **plain_record(self)}

    def record(self) -> Record | None:
        """Return the facts about this run, for reports; ``None`` before it has seen its training data."""
        return record_of(self)

    def keep_journal_beside(self, path: Path) -> None:
        """Keep the journal beside a checkpoint that was saved, if that is a local directory."""
        if self.processes.is_first and path.parent.is_dir():
            self._history.journal.add_directory(path.parent)

    def resume(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Count every release that a checkpoint and the journals beside it know of."""
        self.processes.together(lambda: self._read(checkpoint, path))
        self._history.went_on(self.processes)
        self.keep_journal_beside(path)  # whoever resumes from there again must find what this run releases

    def _read(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        state = checkpoint.get(_CHECKPOINT_KEY)
        if state is not None:
            earlier = earlier_record(state)
            check_selected(earlier, self.settings.resolved_accountant())
            self.training = self.training or (earlier.training if earlier else None)
            self.public_mix = self.public_mix or (earlier.public_mix if earlier else "")
            self._releases_per_draw = earlier.mechanism.releases_per_draw if earlier else 1
            if self.bound is not None and "bound" in state:
                self.bound.load_state_dict(state["bound"])
        elif checkpoint.get("global_step"):
            _log.warning("%s holds no record of releases: what its training spent is not in this run's epsilon.", path)
        self._history.read(state, path)

    def keep_in(self, directory: Path, history: Mapping[str, Any] | None) -> None:
        """Keep the journal in a directory from now on, and count what was released there before: see `History`."""
        self._history.keep_in(directory, history)

    def close(self) -> None:
        """Leave the exact number of releases on disk."""
        self._history.close()
