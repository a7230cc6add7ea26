"""A run that is killed: resumes from a checkpoint, then makes releases, telling of each in a file of its own."""

import json
import multiprocessing
import os
import time
from pathlib import Path

from lightning_dp.accounting import Journal, Ledger, Release

KINDS = (Release(1.0, 0.1), Release(2.0, 0.1))


def run(checkpoint: Path | None, directory: Path, made: Path, block: int | None, every: int) -> None:
    """Make releases for ever, and save a checkpoint every so many; add a byte to ``made`` after each release."""
    ledger, journal = Ledger(), Journal()
    if checkpoint:
        ledger.merge(json.loads(checkpoint.read_text()))
        Journal.read(directory, ledger)
    save(ledger, journal, directory)
    witness = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        release = KINDS[ledger.num_releases // 25 % 2]
        journal.reserve(ledger, release, block=block)
        ledger.book(release)
        os.write(witness, b"x")
        time.sleep(0.0002)
        if ledger.num_releases % every == 0:
            save(ledger, journal, directory)


def save(ledger: Ledger, journal: Journal, directory: Path) -> None:
    temporary = directory / f"{os.getpid()}.tmp"
    temporary.write_text(json.dumps(ledger.state_dict()))
    os.replace(temporary, directory / f"checkpoint-{ledger.num_releases:06d}-{os.getpid()}.json")
    journal.add_directory(directory)


def fork_server(monkeypatch) -> multiprocessing.context.ForkServerContext:
    """A server that has everything imported forks the processes: a start takes a fraction of a second."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.strategies.test_kills"])
    return context
