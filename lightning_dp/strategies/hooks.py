"""The hooks of Lightning that make steps private, whatever else a strategy does.

Owns: which hook does what. Does not own: sampling (``data``), per-sample gradients (``bookkeeping``), clipping and
noise (``private_step``), the budget (``budget``) or the checks (``checks``), nor devices and processes (``dp``).

One Lightning batch is one logical batch, so that ``global_step``, ``max_steps``, schedulers and progress bars count
what they always count. Reading order of one step: `training_step`, `backward`, `optimizer_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.bookkeeping import BookKeeping, Keeping, NotObserved
from lightning_dp.data import Drawn, PhysicalBatch
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.processes import processes_of
from lightning_dp.strategies import checks
from lightning_dp.strategies.apart import check_apart
from lightning_dp.strategies.between import check_data
from lightning_dp.strategies.measuring import Step, fastest_size
from lightning_dp.strategies.preparing import Prepared, look_again, prepare
from lightning_dp.strategies.public_steps import PublicStepping, PublicSteps
from lightning_dp.strategies.run import PrivateRun
from lightning_dp.strategies.settings import PrivacySettings
from lightning_dp.strategies.status import PrivacyStatus
from lightning_dp.strategies.stepping import Stepping, Unprepared
from lightning_dp.strategies.undisturbed import Attempt, drawing_alike

S = TypeVar("S", bound="PrivateHooks")

Rehearsal = Callable[[PrivateRun, Callable[[Any], Any], Callable[..., Any], Callable[[Stepping], Stepping]], None]
"""``rehearsal(run, moved, step, put)``: ``step(moved(batch), batch_idx)`` runs the training step on a batch, behind the
stepping that ``put`` puts there."""


class PrivateHooks(PrivacyStatus, ParallelStrategy):
    """To be mixed into a strategy of Lightning, before it; `_begin_run` comes with its construction."""

    _timeout: timedelta | None  # of that strategy: how long to wait for other processes

    def _begin_run(self, settings: PrivacySettings) -> None:
        """Begin a run, with the checked arguments of the strategy."""
        self._run = PrivateRun(settings)
        self._prepared: Prepared | None = None
        self._sized: tuple[Prepared, int] | None = None
        self._stepping: Stepping = Unprepared()
        self._rehearsal: Rehearsal | None = None
        self._public: PublicSteps | None = None
        self._iterated: object = None

    @property
    def public(self) -> PublicSteps | None:
        """The public part of the present fit, if it has one."""
        return self._public

    def mix_public(self, public: PublicSteps | None) -> None:
        """Let the steps of the next fit be made of public data, too."""
        self._public = public
        self._run.mixing = None if public is None else public.mixing
        if public is not None:
            self._run.public_mix = public.mixing.settings.mix

    def successor(self: S, **changes: Any) -> S:
        """Return a strategy for another trainer that goes on with this run: one ledger, one journal, one budget.

        Args:
            **changes: Arguments that are others from then on.

        Raises:
            PrivacyConfigurationError: If they do not go together.
        """
        strategy = self.another(**changes)
        self._run.settings, strategy._run = strategy._run.settings, self._run
        return strategy

    def another(self: S, **changes: Any) -> S:
        """Return a strategy with the same arguments for a run of its own, with a ledger and a budget of its own.

        Args:
            **changes: Arguments that are others.

        Raises:
            PrivacyConfigurationError: If they do not go together.
        """
        arguments = {field.name: getattr(self._run.settings, field.name) for field in fields(PrivacySettings)}
        return type(self)(**{**arguments, **changes})

    # ---- before the first step ---------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Find the other processes."""
        super().setup_environment()
        self._run.join(processes_of(self.world_size, self.root_device, self._timeout))

    def process_dataloader(self, dataloader: object) -> object:
        """Replace the train dataloader by one that draws Poisson samples, and settle the mechanism."""
        trainer = self._module.trainer
        if trainer.state.stage != RunningStage.TRAINING:
            return super().process_dataloader(dataloader)
        if not self._module.automatic_optimization:
            # The mechanism is settled anew, and how often one draw is released is only known after a look.
            self._forget()
        loader = self._run.plan(dataloader, trainer, self.world_size)
        check_data(self._run.processes, loader)
        loader.before_epoch = self._settle_size
        public, run = self._public, self._run
        begin = partial(public.begin_private, trainer, run) if public else None
        self._iterated = loader if public is None or begin is None else public.loader(trainer, run, begin)
        return self._iterated

    def on_train_start(self) -> None:
        """Check that the loader whose draws are accounted is the one that Lightning iterates."""
        super().on_train_start()
        if self._module.trainer.train_dataloader is not self._iterated:
            raise PrivacyConfigurationError(
                f"the train dataloader is a {type(self._module.trainer.train_dataloader).__name__} of several: "
                "expected one DataLoader. Training on several datasets at once is not accounted for."
            )
        self._forget()
        if self._rehearsal is not None:
            self._rehearsal(self._run, self._moved, self._free_step, self._put)
        if self._public is not None:
            with drawing_alike(self._run.processes):
                self._public.look(self._module, self._run, self._with_transfer(self._free_step), self._put)

    @contextmanager
    def rehearsing(self, rehearsal: Rehearsal) -> Iterator[None]:
        """Have ``rehearsal`` called by a fit that is ready for its first step; it may end the fit by an exception."""
        self._rehearsal = rehearsal
        try:
            yield
        finally:
            self._rehearsal = None

    # ---- one logical batch -------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run all physical batches of a logical batch; the backward pass of the last one is left to Lightning."""
        batch, *rest = args
        assert self._run.loader is not None, "fit sets up the loader before its first step"
        if self._public is not None and self._public.is_alone:
            return self._public_step(self._public, *args, **kwargs)
        delivered, others = self._run.loader.take()
        self.budget.check_next(delivered.step)
        if not self._module.automatic_optimization:
            checks.check_undivided(others)

        def run_step(data: Any, batch_idx: int | None = None) -> Any:
            arguments = rest if batch_idx is None else [batch_idx, *rest[1:]]
            return Strategy.training_step(self, data, *arguments[: len(rest)], **kwargs)

        prepared = self._begin(delivered, run_step)
        if self._public is not None:
            check = partial(check_apart, self._module, self._run, self._with_transfer(run_step), self._put)
            self._public.run_beside(self._module, partial(self._run_public, run_step), check)
        for other in others:
            moved = PhysicalBatch(self._moved(other.data), other.num_rows, other.num_real)
            loss = checks.loss_of(self._forward(prepared, moved, run_step))
            if loss is not None:
                self.backward(loss, self.optimizers[0])
        output = self._forward(prepared, PhysicalBatch(batch, delivered.num_rows, delivered.num_real), run_step)
        if self._module.automatic_optimization:
            checks.loss_of(output)
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run a backward pass; the gradients of its samples go into the book, not into ``.grad``."""
        plugin, stepping = self.precision_plugin, self._stepping
        if not stepping.is_trial:
            self.pre_backward(closure_loss)
            closure_loss = plugin.pre_backward(closure_loss, self._module)
        stepping.backward(closure_loss, lambda: plugin.backward(closure_loss, self._module, optimizer, *args, **kwargs))
        if not stepping.is_trial:
            closure_loss = plugin.post_backward(closure_loss, self._module)
            self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Let an optimizer step by released gradients."""

        def private_closure() -> Any:
            with self._stepping.recording():
                result = closure()
            # Only now: under automatic optimization the training step, which may prepare another, is in the closure.
            result = self._stepping.release(optimizer, result)
            if self._public is not None:
                self._public.blend(optimizer, self._stepping.noise_std)
            return result

        if self._stepping.is_trial:
            return private_closure()
        with self._stepping.paused():
            return super().optimizer_step(optimizer, private_closure, model, **kwargs)

    def _begin(self, drawn: Drawn, run_step: Callable[..., Any]) -> Prepared:
        """Begin a logical batch; on the first one, and when other parameters are trained, observe the model."""
        prepared = self._prepare(run_step)
        self._stepping.begin_draw(drawn.step, self._run.mechanism_of(drawn))
        return prepared

    def _prepare(self, run_step: Callable[..., Any]) -> Prepared:
        """Observe the model, unless that was done for the parameters that are trained."""
        checks.check_trainer(self._module.trainer)
        prepared = self._prepared
        if prepared is None or not prepared.holds_for(self._module):
            with drawing_alike(self._run.processes):
                prepared = prepare(self._module, self._run, self._with_transfer(run_step), self._put)
            self._prepared = prepared
        self._stepping = prepared.stepping  # after public steps it is another one
        return prepared

    def _public_step(self, public: PublicSteps, *args: Any, **kwargs: Any) -> Any:
        """Run the training step as without privacy, on a batch of the public dataloader."""

        def done() -> None:
            public.average(self._module)
            self._put(Unprepared())

        self._put(PublicStepping(done))
        output = Strategy.training_step(self, *args, **kwargs)
        public.note(output)
        return output

    def _run_public(self, run_step: Callable[..., Any], data: Any) -> None:
        """Run the training step as without privacy on another batch, forward and backward."""
        batch, before = self._moved(data), self._put(PublicStepping())
        self._log_batch(batch)
        try:
            loss = checks.loss_of(run_step(batch))
            if loss is not None:
                self.backward(loss, self.optimizers[0])
        finally:
            self._put(before)

    def _settle_size(self) -> None:
        """Find the fastest physical batch size, where it is asked for, before anything of an epoch is drawn.

        It is found when other parameters are trained than before, and kept in between, also for another dataloader.
        Once a batch is there it is too late: workers have fetched those that follow.
        """
        module, loader = self._module, self._run.loader
        if not (self._run.settings.finds_size and module.automatic_optimization and module.trainer.training):
            return
        assert loader is not None, "it is the one that begins an epoch"
        self._run.budget.check_next()
        run_step = self._free_step
        prepared = self._prepare(run_step)
        if self._sized is None or self._sized[0] is not prepared:
            choice = fastest_size(prepared, Step(self._run, module, self._moved, run_step, self._put))
            rank_zero_info(choice.sentence(loader.units.unit))
            self._sized = prepared, choice.size
        loader.max_physical_batch_size = self._sized[1]

    def _free_step(self, data: Any, batch_idx: int | None = None) -> Any:
        """Run the training step on a batch that Lightning did not fetch."""
        takes_index = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        return Strategy.training_step(self, data, *([batch_idx or 0] if takes_index else []))

    def _log_batch(self, batch: Any) -> None:
        """Do what Lightning does for the batches that it fetches itself: logged values have their weight."""
        results = self._module.trainer._results
        if results is not None:
            results.batch, results.batch_size = batch, None

    def _forward(self, prepared: Prepared, batch: PhysicalBatch, run_step: Callable[..., Any]) -> Any:
        """Run the training step on a physical batch; if it takes a branch that no step before took, look at that."""
        keeping = prepared.keeping
        if not self._module.automatic_optimization or not isinstance(keeping, BookKeeping) or keeping.in_parts:
            # Optimizers may have stepped before a refusal; and only together can processes look at sharded parameters.
            return self._recorded(keeping, batch, run_step)
        attempt = Attempt(prepared.tree, prepared.draws_elsewhere)
        try:
            return self._recorded(keeping, batch, run_step)
        except NotObserved:
            keeping.abandon()
            attempt.undo()
        look_again(self._module, self._run, self._with_transfer(run_step), self._put, keeping)
        return self._recorded(keeping, batch, run_step)

    def _recorded(self, keeping: Keeping, batch: PhysicalBatch, run_step: Callable[..., Any]) -> Any:
        self._stepping.begin(batch.num_real)
        self._log_batch(batch.data)
        try:
            with self._stepping.running(batch.data), keeping.recording(batch.num_rows):
                return run_step(batch.data)
        finally:
            self._stepping.end()

    def _with_transfer(self, run_step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda data, batch_idx=None: run_step(self._moved(data), batch_idx)

    def _put(self, stepping: Stepping) -> Stepping:
        """Put another stepping behind the hooks, and return the one before."""
        before, self._stepping = self._stepping, stepping
        return before

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.keeping.abandon()
        self._prepared, self._sized, self._stepping = None, None, Unprepared()

    def _moved(self, batch: Any) -> Any:
        """Do to a batch what Lightning does to those it fetches itself."""
        batch = self.precision_plugin.convert_input(batch)
        return self.batch_to_device(self._module._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0)

    # ---- what outlives the fit ---------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the ledger in the checkpoint, and begin to keep the journal beside it."""
        self._run.put_into(checkpoint, Path(filepath))
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self._run.keep_journal_beside(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; to go on with a fit, also every release that it and the journals beside it know of."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._run.resume(checkpoint, Path(checkpoint_path))
        return checkpoint

    def teardown(self) -> None:
        """Leave nothing on the module, and the exact number of releases on disk; also after an exception."""
        self._forget()
        self._run.close()
        self.mix_public(None)
        super().teardown()

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None, "the trainer connects the module first"
        return self.lightning_module
