"""Signals that end a fit on several processes, or save its state: held back until all of them have heard.

Owns: when Lightning's handlers are called. Does not own: what they do (Lightning), or how others hear (``meeting``).

Lightning's handlers talk to the other processes: that of SIGTERM from 2.6 on, that of a requeue under SLURM since it
saves a checkpoint. Called where the signal finds a process, they would stand in the place of another collective, and
all would wait. A signal that only one process has received is for all of them, too: none can go on without it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from lightning_dp.processes import Processes


class HeldSignals:
    """Of one fit at a time."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._handled: set[int] = set()
        self._processes, self._pid = Processes(), 0

    def hold(self, processes: Processes) -> None:
        """Hold the signals back that Lightning handles; it may be called more than once.

        Args:
            processes: Hear of them.
        """
        if processes.size == 1 or threading.current_thread() is not threading.main_thread():
            return
        self._processes, self._pid = processes, os.getpid()
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if isinstance(handler, _HandlersCompose):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def handle(self) -> bool:
        """Call the handlers of all signals that any process has received, once in a fit; return whether there were any.

        Whoever ends a job sends it to all processes, which may tell of it one after the other.
        """
        heard = self._processes.heard()
        for number in heard:
            if number in self._handlers and number not in self._handled:
                self._handled.add(number)
                self._handlers[number](number, None)
        return bool(heard)

    def let_go(self) -> None:
        """Let Lightning handle them again as they come."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._handlers.clear()
        self._handled.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._processes.note(number)
        else:  # one that was forked from here
            self._handlers[number](number, frame)
