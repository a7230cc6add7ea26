"""How a fit on several processes ends before its time: in all of them, after the same release.

Owns: when signals are handled, and that errors are told. Does not own: which signals (``signals``), or the telling
(``processes``).
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dp.strategies.hooks import PrivateHooks
from lightning_dp.strategies.settings import PrivacySettings
from lightning_dp.strategies.signals import HeldSignals


class EndingTogether(PrivateHooks):
    """The hooks of Lightning between two releases."""

    def _begin_run(self, settings: PrivacySettings) -> None:
        super()._begin_run(settings)
        self._signals = HeldSignals()

    def process_dataloader(self, dataloader: object) -> object:
        """Hold signals back from here on, before the first release is planned."""
        if self._is_fitting:
            self._signals.hold(self._run.processes)
        return super().process_dataloader(dataloader)

    # What a process has received is told to the others at the next release, or before it. These are the places after
    # it that come in all processes: before the next batch, around a validation, and at the end.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Handle signals."""
        super().on_train_batch_start(batch, batch_idx)
        self._handle_signals()

    def on_validation_start(self) -> None:
        """Handle signals."""
        super().on_validation_start()
        self._handle_signals()

    def on_validation_end(self) -> None:
        """Handle signals that have come in a validation, which may be long, before another release."""
        super().on_validation_end()
        if self._is_fitting and not self._module.trainer.sanity_checking:
            self._run.processes.meet("the end of a validation")
            self._handle_signals()

    def on_train_end(self) -> None:
        """Handle signals that have come after the last release, too."""
        super().on_train_end()
        self._run.processes.meet("the end of training")
        while self._handle_signals():
            self._run.processes.meet("a signal at the end of training")
        self._signals.let_go()

    def barrier(self, name: str | None = None) -> None:
        """Tell the other processes of an error before waiting for them.

        Callbacks hear of an exception before the strategy does, and may save a checkpoint, which all wait for.
        """
        if self._is_fitting and self._module.trainer.state.status == TrainerStatus.INTERRUPTED:
            self._tell(sys.exc_info()[1])
        super().barrier(name)  # type: ignore[safe-super]  # of the strategy that this is mixed into

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other processes."""
        try:
            super().on_exception(exception)
            self._tell(exception)
        finally:
            self._signals.let_go()

    def _tell(self, exception: BaseException | None) -> None:
        """Tell of an error, unless the user has ended all processes."""
        if self._is_fitting and exception is not None and not isinstance(exception, KeyboardInterrupt):
            self._run.processes.fail(exception)

    def teardown(self) -> None:
        """Leave signals to Lightning."""
        self._signals.let_go()
        super().teardown()

    def _handle_signals(self) -> bool:
        """Handle what all processes have heard of, and return whether that was anything.

        Raises:
            SIGTERMException: In all of them at once, if that is to end them.
        """
        handled = self._signals.handle()
        if self._run.processes.size > 1 and self._module.trainer.received_sigterm:
            raise SIGTERMException
        return handled

    @property
    def _is_fitting(self) -> bool:
        module = self.lightning_module
        attached = module is not None and module._trainer is not None  # not in the process that started the others
        return attached and self._module.trainer.state.fn == TrainerFn.FITTING
