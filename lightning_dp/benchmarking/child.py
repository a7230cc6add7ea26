"""The processes that train.

Owns: their beginning and end, and what becomes of their errors. Does not own: whose turn it is (``race``).
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from lightning_dp.benchmarking.baton import Baton, Ended, Facts, Failed, Finished, Step, Token
from lightning_dp.errors import PrivacyError
from lightning_dp.strategies.memory import is_out_of_memory

Training = Callable[[Baton], None]
"""Builds a training and runs it, calling ``baton.wait()`` before each step. It goes to another process, so it is
picklable: a function of a module, or an instance of a dataclass with ``__call__``."""

Message = TypeVar("Message", Facts, Step, Finished)

_PATIENCE = 10.0  # seconds for a process to end by itself


class BenchmarkError(PrivacyError):
    """A training that was to be measured has failed; the message has its traceback."""


class OutOfMemory(BenchmarkError):
    """A training that was to be measured needs more memory than there is."""


class Child:
    """A training in a process of its own.

    Args:
        name: What it is called, for errors.
        training: What it runs.
    """

    def __init__(self, name: str, training: Training) -> None:
        self.name = name
        context = get_context("spawn")  # a fork has no threads and no GPU
        self._connection, there = context.Pipe()
        # No daemon: those may not have the worker processes of a dataloader. It ends when the connection does.
        self._process = context.Process(target=_work, args=(there, training), name=name)
        self._process.start()
        there.close()

    def tell(self, token: Token) -> None:
        """Pass a token.

        Raises:
            BenchmarkError: If the process has died.
        """
        try:
            self._connection.send(token)
        except OSError:
            raise self._died() from None

    def hear(self, kind: type[Message]) -> Message:
        """Wait for what it says next.

        Raises:
            OutOfMemory: If its memory did not suffice.
            BenchmarkError: If it failed, or died.
        """
        wait([self._connection, self._process.sentinel])
        try:
            message = self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):
            message = None
        if isinstance(message, kind):
            return message
        if isinstance(message, Failed):
            error = OutOfMemory if message.out_of_memory else BenchmarkError
            raise error(f"{self.name}: {message.reason}")
        raise self._died()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> BenchmarkError:
        self._process.join(_PATIENCE)
        status = self._process.exitcode
        if status == -signal.SIGKILL:
            return OutOfMemory(f"{self.name}: the process was killed, as systems do that run out of memory.")
        return BenchmarkError(
            f"{self.name}: the process ended with exit status {status} before its last step. What it printed stands "
            "above."
        )


def _work(connection: Connection, training: Training) -> None:
    """Run a training in this process, and send its last word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it, too
    sys.argv = sys.argv[:1]  # those of the process that started this one
    for library in ("lightning.pytorch", "lightning.fabric", "lightning_dp"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    baton = Baton(connection)
    try:
        training(baton)
        if not baton.has_ended:
            connection.send(Failed("the training ended before it was told to: it has too few steps or no data."))
    except (Ended, ConnectionError):  # told to end, or nobody is left to tell
        pass
    except BaseException as error:
        connection.send(_failure(error))


def _failure(error: BaseException) -> Failed:
    if isinstance(error, SystemExit):
        return Failed(f"ended with exit status {error.code}. What it printed stands above.")
    if isinstance(error, PrivacyError):
        return Failed(str(error))  # it says what was found and the way out
    return Failed(f"failed.\n\n{''.join(traceback.format_exception(error))}", out_of_memory=is_out_of_memory(error))
