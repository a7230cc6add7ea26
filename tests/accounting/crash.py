"""A run that is killed: resumes from a checkpoint, then makes releases, telling of each in a file of its own.

Arguments: checkpoint to load ("" for none), checkpoint directory, file to add a byte to after each release, block,
number of releases between checkpoints.
"""

import json
import os
import sys
from pathlib import Path

from lightning_dp.accounting import Journal, Ledger, Release

checkpoint, directory, made, block, every = sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:6])
ledger, journal = Ledger(), Journal()
if checkpoint:
    ledger.merge(json.loads(Path(checkpoint).read_text()))
    Journal.read(directory, ledger)


def save() -> None:
    temporary = directory / f"{os.getpid()}.tmp"
    temporary.write_text(json.dumps(ledger.state_dict()))
    os.replace(temporary, directory / f"checkpoint-{ledger.num_releases:06d}-{os.getpid()}.json")
    journal.add_directory(directory)


save()
witness = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    noise = 1.0 if ledger.num_releases % 50 < 25 else 2.0
    journal.reserve(ledger, Release(noise, 0.1), block=block)
    ledger.book(Release(noise, 0.1))
    os.write(witness, b"x")
    os.fsync(witness)
    if ledger.num_releases % every == 0:
        save()
