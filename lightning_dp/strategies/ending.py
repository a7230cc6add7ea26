"""How a fit on several processes ends before its time: in all of them, after the same release.

Owns: when signals are handled, and that errors are told. Does not own: which signals (``signals``), or the telling
(``processes``).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
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
    # it that come in all processes: before the next batch, before a validation, and at the end.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Handle signals."""
        super().on_train_batch_start(batch, batch_idx)
        self._handle_signals()

    def on_validation_start(self) -> None:
        """Handle signals."""
        super().on_validation_start()
        self._handle_signals()

    def on_train_end(self) -> None:
        """Handle signals that have come after the last release, too."""
        super().on_train_end()
        self._run.processes.meet("the end of training")
        self._handle_signals()
        self._signals.let_go()

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other processes, unless the user has ended all of them."""
        super().on_exception(exception)
        if self._is_fitting and not isinstance(exception, KeyboardInterrupt):
            self._run.processes.fail(exception)

    def teardown(self) -> None:
        """Leave signals to Lightning."""
        self._signals.let_go()
        super().teardown()

    def _handle_signals(self) -> None:
        """Handle what all processes have heard of; end all of them at once, if that is to end them."""
        self._signals.handle()
        if self._run.processes.size > 1 and self._module.trainer.received_sigterm:
            raise SIGTERMException

    @property
    def _is_fitting(self) -> bool:
        module = self.lightning_module
        attached = module is not None and module._trainer is not None  # not in the process that started the others
        return attached and self._module.trainer.state.fn == TrainerFn.FITTING
