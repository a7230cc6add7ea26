"""Several processes on this machine, forked from one that has imported everything: a world starts in a second.

Lightning takes them for processes that something else has started, as torchrun does.
"""

import multiprocessing as mp
import os
import re
import socket
import sys
import traceback
import warnings
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[2]
_PRELOADED = ["lightning_dp", "tests.models", "tests.processes.fits"]


class World:
    """So many processes, each of which runs ``function(*args)``; those that are asked for are not waited for."""

    def __init__(self, size, function, *args):
        context = mp.get_context("forkserver")
        _start_server(context)
        port, here = free_port(), os.getcwd()
        self._pipes, self.processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(sender, rank, port, here, function, args), daemon=True)
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self.processes.append(process)

    def outcomes(self, timeout):
        """What each process returned, or the text of what it raised; ``None`` for one that was killed."""
        found = []
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            value = None
            with suppress(EOFError):
                if not pipe.poll(timeout):
                    raise TimeoutError(f"process {process.pid} has not ended after {timeout} s")
                value = pipe.recv()
            process.join(timeout)
            found.append(value)
        return found

    def end(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()


def run(size, function, *args, timeout=300):
    """Return what ``function(*args)`` returned in each of so many processes, by rank."""
    outcomes = ended(size, function, *args, timeout=timeout)
    for rank, (value, error) in enumerate(outcomes):
        assert error is None, f"process {rank}: {error}"
        outcomes[rank] = value
    return outcomes


def ended(size, function, *args, timeout=300):
    """Return ``(value, None)`` or ``(None, the text of the error)`` of each of so many processes."""
    world = World(size, function, *args)
    try:
        return world.outcomes(timeout)
    finally:
        world.end()


def assert_errors(everywhere, expected):
    """Assert that every process has met the errors that these patterns describe, by name."""
    for errors in everywhere:
        assert errors.keys() == expected.keys()
        for name, error in errors.items():
            assert re.search(expected[name], error), f"{name}: {error}"


def _start_server(context):
    """Start the process that all others are forked from; it does not look for modules where this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *sys.path])
    context.set_forkserver_preload(_PRELOADED)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(pipe, rank, port, directory, function, args):
    os.chdir(directory)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # every process has initial weights of its own
    try:
        outcome = function(*args), None
    except BaseException as error:
        outcome = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    pipe.send(outcome)
    pipe.close()
