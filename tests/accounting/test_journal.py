"""The journal: whatever happens, the record is never behind the releases made."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_dp.accounting import Journal, Ledger, Release
from lightning_dp.accounting import journal as module
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError


def release(journal: Journal, ledger: Ledger, count: int, noise: float = 1.0, **options) -> None:
    for _ in range(count):
        journal.reserve(ledger, Release(noise, 0.1), **options)
        ledger.book(Release(noise, 0.1))


def resumed(state: dict, directory: Path) -> Ledger:
    ledger = Ledger()
    ledger.merge(json.loads(json.dumps(state)))
    Journal.read(directory, ledger)
    return ledger


def started(*directories: Path) -> tuple[Journal, Ledger, dict]:
    """A run that has saved its first checkpoint, before any release."""
    journal, ledger = Journal(), Ledger()
    for directory in directories:
        journal.add_directory(directory)
    return journal, ledger, ledger.state_dict()


def test_every_release_is_on_disk_before_it_is_made(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    for made in range(1, 20):
        journal.reserve(ledger, Release(1.0, 0.1), block=4)
        assert made <= resumed(checkpoint, tmp_path).num_releases < made + 4
        ledger.book(Release(1.0, 0.1))


def test_writes_once_per_block(tmp_path, monkeypatch):
    writes = []
    original = module._replace
    monkeypatch.setattr(module, "_replace", lambda path, text: (writes.append(path), original(path, text)))
    journal, ledger, _ = started(tmp_path)
    release(journal, ledger, 100, block=10)
    assert len(writes) == 10
    assert set(writes) == {tmp_path / f"privacy-journal-{ledger.own_segment}.json"}


def test_no_directory_no_file(tmp_path):
    journal, ledger, _ = started()
    release(journal, ledger, 3)
    journal.close(ledger)
    assert list(tmp_path.iterdir()) == []


def test_clean_end_is_exact(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 13, block=10)
    assert resumed(checkpoint, tmp_path).num_releases == 20
    journal.close(ledger)
    assert resumed(checkpoint, tmp_path).num_releases == 13
    release(journal, ledger, 1, block=5)  # going on after a close reserves anew
    assert resumed(checkpoint, tmp_path).num_releases == 18


def test_cap_keeps_a_reservation_within_the_budget(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    for left in range(7, 0, -1):
        release(journal, ledger, 1, block=5, cap=left)
        assert resumed(checkpoint, tmp_path).num_releases <= 7
    assert resumed(checkpoint, tmp_path).num_releases == 7


def test_change_of_noise(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 3, block=5)
    release(journal, ledger, 2, noise=2.0, block=4)
    counts = {phase.noise_multiplier: phase.num_releases for phase in resumed(checkpoint, tmp_path).phases}
    assert counts == {1.0: 3, 2.0: 4}  # the reserved, never made releases with the old noise are gone


def test_directory_added_in_the_middle_of_a_block(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    journal, ledger, _ = started(first)
    release(journal, ledger, 3, block=10)
    checkpoint = ledger.state_dict()
    journal.add_directory(second)
    release(journal, ledger, 1, block=10)
    assert resumed(checkpoint, second).num_releases >= 4


def test_deleted_directory_is_skipped(tmp_path):
    directory = tmp_path / "gone"
    directory.mkdir()
    journal, ledger, _ = started(directory, tmp_path)
    release(journal, ledger, 1)
    next(directory.iterdir()).unlink()
    directory.rmdir()
    release(journal, ledger, 1)
    journal.close(ledger)
    assert not directory.exists()


def test_history_loaded_between_releases_is_linked(tmp_path):
    """A process loads a second history while its reservation still holds; a crash then must not part them."""
    _, old, _ = started()
    for _ in range(5):
        old.book(Release(1.0, 0.1))
    journal, ledger, _ = started(tmp_path)
    release(journal, ledger, 1, block=100)
    ledger.merge(old.state_dict())
    release(journal, ledger, 2, block=100)
    assert resumed(old.state_dict(), tmp_path).num_releases >= 8


def test_chain_of_resumed_runs(tmp_path):
    """Each run saves its checkpoint elsewhere in the chain; from the very first one, all three are found."""
    journal, ledger, first = started(tmp_path)
    release(journal, ledger, 3)
    checkpoint = ledger.state_dict()
    for count in (4, 5):
        journal, ledger = Journal(), resumed(checkpoint, tmp_path)
        journal.add_directory(tmp_path)
        release(journal, ledger, count)
        checkpoint = ledger.state_dict()
    assert resumed(first, tmp_path).num_releases == 12


def test_other_runs_in_the_directory_do_not_count(tmp_path):
    for _ in range(2):
        journal, ledger, checkpoint = started(tmp_path)
        release(journal, ledger, 3)
    assert resumed(checkpoint, tmp_path).num_releases == 3


def test_checkpoint_without_its_journal_counts_alone(tmp_path):
    journal, ledger, _ = started(tmp_path)
    release(journal, ledger, 3)
    assert resumed(ledger.state_dict(), tmp_path / "moved").num_releases == 3


def test_own_reservation_does_not_count_in_the_same_process(tmp_path):
    journal, ledger, _ = started(tmp_path)
    release(journal, ledger, 3, block=100)
    Journal.read(tmp_path, ledger)
    assert ledger.num_releases == 3


def test_killed_between_write_and_replace(tmp_path, monkeypatch):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.reserve(ledger, Release(1.0, 0.1))
    assert resumed(checkpoint, tmp_path).num_releases == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 9, "segments": {}}', b"\xff", b'{"version": 2}'])
def test_corrupt_journal_is_not_ignored(tmp_path, content):
    (tmp_path / "privacy-journal-abc.json").write_bytes(content)
    with pytest.raises(PrivacyError, match=r"privacy-journal-abc\.json cannot be read"):
        Journal.read(tmp_path, Ledger())


def test_unwritable_journal_stops_the_release(tmp_path, monkeypatch):
    journal, ledger, _ = started(tmp_path)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PrivacyError, match=r"privacy-journal-.*\.json cannot be written \(No space left"):
        journal.reserve(ledger, Release(1.0, 0.1))


@pytest.mark.parametrize("name", ["block", "cap"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_block_and_cap(name, value):
    with pytest.raises(PrivacyConfigurationError, match=f"{name}={value}: expected an integer"):
        Journal().reserve(Ledger(), Release(1.0, 0.1), **{name: value})


def run_and_kill(checkpoint: Path | None, directory: Path, made: Path, block: int, seconds: float) -> None:
    """Start the run, wait until it has made a release, let it go on for a while, kill it without warning."""
    before = made.stat().st_size if made.exists() else 0
    script = Path(__file__).with_name("crash.py")
    arguments = [str(checkpoint or ""), str(directory), str(made), str(block), "37"]
    process = subprocess.Popen([sys.executable, str(script), *arguments])
    deadline = time.monotonic() + 60
    while not made.exists() or made.stat().st_size == before:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run made no release"
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("block", [1, 7, 40])
def test_killed_runs_forget_nothing(tmp_path, block):
    """Resumed from any of its checkpoints, old or new, a run knows at least the releases witnessed outside."""
    chance, made, kills = random.Random(block), tmp_path / "made", 3
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    checkpoint = None
    for kill in range(1, kills + 1):
        run_and_kill(checkpoint, directory, made, block, chance.uniform(0, 0.15))
        checkpoints = sorted(directory.glob("checkpoint-*.json"))
        for candidate in [checkpoints[0], chance.choice(checkpoints), checkpoints[-1]]:
            ledger = resumed(json.loads(candidate.read_text()), directory)
            assert made.stat().st_size <= ledger.num_releases <= made.stat().st_size + kill * block + kill
        checkpoint = chance.choice(checkpoints)
