"""The journal: whatever happens, the record is never behind the releases made."""

import copy
import errno
import json
import os
import pickle
import random
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest

from lightning_dp.accounting import Journal, Ledger, Release, exact_count
from lightning_dp.accounting import journal as module
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from tests.accounting.crash import KINDS, fork_server, run


def release(journal: Journal, ledger: Ledger, count: int, noise: float = 1.0, **options) -> None:
    for _ in range(count):
        journal.reserve(ledger, Release(noise, 0.1), **options)
        ledger.book(Release(noise, 0.1))


def resumed(state: dict, directory: Path) -> Ledger:
    ledger = Ledger()
    ledger.merge(json.loads(json.dumps(state)))
    Journal.read(directory, ledger)
    return ledger


@pytest.fixture(autouse=True)
def memory(tmp_path_factory, monkeypatch):
    """A memory of this test's own, which a restart would empty."""
    directory = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr(exact_count, "_MEMORY", directory)
    return directory


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
    original = module.replace_file
    monkeypatch.setattr(module, "replace_file", lambda path, text: (writes.append(path), original(path, text)))
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
    release(journal, ledger, 3, block=1)
    checkpoint = ledger.state_dict()
    for count in (4, 5):
        journal, ledger = Journal(), resumed(checkpoint, tmp_path)
        journal.add_directory(tmp_path)
        release(journal, ledger, count, block=1)
        checkpoint = ledger.state_dict()
    assert resumed(first, tmp_path).num_releases == 12


def test_other_runs_in_the_directory_do_not_count(tmp_path):
    for _ in range(2):
        journal, ledger, checkpoint = started(tmp_path)
        release(journal, ledger, 3, block=1)
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


# ---- what a dead process left, case by case -------------------------------------------------------------------


def dead(directory: Path, count: int, noise: float = 1.0, block: int = 10) -> tuple[dict, Ledger]:
    """A checkpoint before any release, and the ledger of the process that then died without a word."""
    journal, ledger, checkpoint = started(directory)
    release(journal, ledger, count, noise, block=block)
    return checkpoint, ledger


def journal_file(directory: Path, ledger: Ledger) -> Path:
    return directory / f"privacy-journal-{ledger.own_segment}.json"


@pytest.mark.parametrize("count", range(1, 12))
def test_after_a_death_the_count_is_exact(tmp_path, count):
    checkpoint, _ = dead(tmp_path, count, block=5)
    assert resumed(checkpoint, tmp_path).num_releases == count


def test_what_is_taken_back_is_of_the_right_kind(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    for kind, count in ((KINDS[0], 3), (KINDS[1], 2), (KINDS[0], 4)):
        release(journal, ledger, count, kind.noise_multiplier, block=10)
    del journal
    assert resumed(checkpoint, tmp_path).counts == {KINDS[0]: 7, KINDS[1]: 2}


def other_boot(record: bytes) -> bytes:
    return record[:-2] + (b"0" if record[-2:-1] != b"0" else b"1") + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: b"",
        lambda record: record[:30],  # torn
        lambda record: b"\x02" + record[1:],  # half of another one
        lambda record: b"\xff" * len(record),
        lambda record: record + b"x",
        other_boot,
    ],
)
def test_a_damaged_count_is_not_believed(tmp_path, memory, damage):
    checkpoint, _ = dead(tmp_path, 3)
    [path] = memory.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_the_count_of_another_process_is_not_believed(tmp_path, memory):
    checkpoint, ledger = dead(tmp_path, 3)
    [mine] = memory.iterdir()
    dead(tmp_path, 1)
    [other] = set(memory.iterdir()) - {mine}
    os.replace(other, mine)
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_after_a_restart_the_reservation_counts(tmp_path, memory, monkeypatch):
    """With a memory that is emptied, and with one that is a disk."""
    checkpoint, _ = dead(tmp_path, 3)
    boot = tmp_path / "boot_id"
    boot.write_text("another-boot\n")
    monkeypatch.setattr(exact_count, "_BOOT_ID", boot)
    assert resumed(checkpoint, tmp_path).num_releases == 10
    boot.unlink()
    assert resumed(checkpoint, tmp_path).num_releases == 10
    monkeypatch.undo()
    shutil.rmtree(memory)
    assert resumed(checkpoint, tmp_path).num_releases == 10


@pytest.mark.parametrize("missing", ["_MEMORY", "_BOOT_ID"])
def test_without_such_a_memory_the_reservation_counts(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(exact_count, missing, tmp_path / "nowhere")
    checkpoint, _ = dead(tmp_path, 3)
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_the_file_of_another_user_is_not_believed(tmp_path, monkeypatch):
    checkpoint, _ = dead(tmp_path, 3)
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_a_link_is_not_followed(tmp_path, memory):
    checkpoint, _ = dead(tmp_path, 3)
    [path] = memory.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_a_running_process_may_make_all_it_reserved(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 3, block=10)
    assert resumed(checkpoint, tmp_path).num_releases == 10
    del journal
    assert resumed(checkpoint, tmp_path).num_releases == 3


def test_a_count_from_before_the_reservation_is_not_believed(tmp_path, memory):
    """As after the machine was put back to a snapshot, but not its disk."""
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 3, block=10)
    [path] = memory.iterdir()
    early = path.read_bytes()
    release(journal, ledger, 9, block=10)
    path.write_bytes(early)
    del journal
    assert resumed(checkpoint, tmp_path).num_releases == 20


def test_a_copy_of_a_running_directory_is_recognised(tmp_path):
    """As a synchronising copy, a backup put back, or a network disk that was away for a while."""
    original, copied = tmp_path / "original", tmp_path / "copied"
    original.mkdir()
    journal, ledger, checkpoint = started(original)
    release(journal, ledger, 3, block=10)
    shutil.copytree(original, copied)
    release(journal, ledger, 7, block=10)
    assert resumed(checkpoint, copied).num_releases == 10  # as much as it knows of
    release(journal, ledger, 1, block=10)
    for _ in ("running", "dead"):
        with pytest.raises(PrivacyError, match=r"11 releases were made where .*copied knows of 10: .* older copy"):
            resumed(checkpoint, copied)
        journal = None
    assert resumed(checkpoint, original).num_releases == 11
    shutil.copytree(original, copied, dirs_exist_ok=True)
    assert resumed(checkpoint, copied).num_releases == 11


def test_a_checkpoint_moved_away_from_its_journal_is_recognised(tmp_path):
    checkpoint, ledger = dead(tmp_path, 3)
    with pytest.raises(PrivacyError, match=r"3 releases were made where .*moved knows of 0: privacy-journal-.* not"):
        resumed(checkpoint, tmp_path / "moved")
    assert resumed(ledger.state_dict(), tmp_path / "moved").num_releases == 3


def test_a_directory_that_was_away_is_recognised(tmp_path):
    """Nothing is on record there of what was released meanwhile."""
    network, away = tmp_path / "network", tmp_path / "away"
    network.mkdir()
    journal, ledger, checkpoint = started(network)
    release(journal, ledger, 3, block=3)
    network.rename(away)
    release(journal, ledger, 3, block=3)
    away.rename(network)
    release(journal, ledger, 1, block=3)
    del journal
    with pytest.raises(PrivacyError, match=r"7 releases were made where .* knows of 3"):
        resumed(checkpoint, network)


def test_renamed_journal_counts_in_full(tmp_path):
    checkpoint, ledger = dead(tmp_path, 3)
    path = journal_file(tmp_path, ledger)
    path.rename(path.with_name("privacy-journal-copy of it.json"))
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_two_processes_resumed_at_the_same_time_both_count(tmp_path):
    checkpoint, _ = dead(tmp_path, 3)
    first, second = resumed(checkpoint, tmp_path), resumed(checkpoint, tmp_path)
    journals = Journal(), Journal()
    for _ in range(4):
        for journal, ledger in zip(journals, (first, second), strict=True):
            journal.add_directory(tmp_path)
            release(journal, ledger, 1, block=5)
    assert resumed(checkpoint, tmp_path).num_releases == 3 + 5 + 5
    del journal, journals
    assert resumed(checkpoint, tmp_path).num_releases == 3 + 4 + 4


def test_reservations_of_the_dead_are_settled_for_the_time_after_a_restart(tmp_path, memory):
    checkpoint, _ = dead(tmp_path, 3)
    unrelated, other = dead(tmp_path, 2)
    journal, ledger = Journal(), resumed(checkpoint, tmp_path)
    journal.add_directory(tmp_path)
    release(journal, ledger, 1, block=1)
    shutil.rmtree(memory)
    assert resumed(checkpoint, tmp_path).num_releases == 4
    assert resumed(unrelated, tmp_path).num_releases == 10  # another run's journal is left alone


def test_a_running_process_is_not_settled(tmp_path, memory):
    running, theirs, checkpoint = started(tmp_path)
    release(running, theirs, 3, block=10)
    journal, ledger = Journal(), resumed(checkpoint, tmp_path)
    journal.add_directory(tmp_path)
    before = journal_file(tmp_path, theirs).read_text()
    release(journal, ledger, 1, block=1)
    assert journal_file(tmp_path, theirs).read_text() == before


def test_settling_may_fail(tmp_path, monkeypatch):
    checkpoint, theirs = dead(tmp_path, 3)
    journal, ledger = Journal(), resumed(checkpoint, tmp_path)
    journal.add_directory(tmp_path)
    monkeypatch.setattr("lightning_dp.accounting.recovery.replace_file", failing(errno.EROFS))
    release(journal, ledger, 1, block=1)
    assert resumed(checkpoint, tmp_path).num_releases == 4


def failing(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("function", "number"),
    [("fsync", errno.EIO), ("replace", errno.EACCES), ("open", errno.EROFS), ("open", errno.EMFILE)],
)
def test_a_failing_disk_stops_the_release(tmp_path, monkeypatch, function, number):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 4, block=4)
    monkeypatch.setattr(os, function, failing(number))
    with pytest.raises(PrivacyError, match=rf"privacy-journal-.*\.json cannot be written .*{os.strerror(number)}"):
        journal.reserve(ledger, KINDS[0])
    monkeypatch.undo()
    assert resumed(checkpoint, tmp_path).num_releases >= 4
    release(journal, ledger, 1, block=1)  # it goes on when there is room again
    journal.close(ledger)
    assert resumed(checkpoint, tmp_path).num_releases == 5


def test_a_closed_count_stops_the_release(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 2, block=4)
    journal._count._close()
    with pytest.raises(PrivacyError, match=r"number of releases cannot be stored in .*count \(.*released"):
        journal.reserve(ledger, KINDS[0], block=4)
    del journal
    assert resumed(checkpoint, tmp_path).num_releases == 2


@pytest.mark.parametrize(
    ("stored", "expected"), [((4, 3), 4), ((4, 4), 4), ((3, 4), 10), ((5, 3), 10), ((2**63, 3), 10)]
)
def test_killed_between_two_stores(tmp_path, memory, stored, expected):
    """The first store may be there without the second; nothing else is what a process leaves."""
    checkpoint, _ = dead(tmp_path, 3)
    [path] = memory.iterdir()
    path.write_bytes(struct.pack("=QQ", *stored) + path.read_bytes()[16:])
    assert resumed(checkpoint, tmp_path).num_releases == expected


def test_a_full_memory_at_the_start_leaves_the_reservation(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    checkpoint, _ = dead(tmp_path, 3)
    assert list(memory.iterdir()) == []
    assert resumed(checkpoint, tmp_path).num_releases == 10


def test_a_count_that_can_neither_be_kept_nor_removed_stops_the_release(tmp_path, monkeypatch):
    """It would be taken for the truth later."""
    journal, ledger, _ = started(tmp_path)
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    monkeypatch.setattr(Path, "unlink", failing(errno.EACCES))
    with pytest.raises(PrivacyError, match=r"count cannot be removed .*Permission denied.*remove it"):
        journal.reserve(ledger, KINDS[0])


def test_a_second_journal_of_one_ledger_is_no_false_witness(tmp_path, memory):
    """Against the rules; the first one's count must not stand while the second one's releases pass it."""
    first, ledger, checkpoint = started(tmp_path)
    second = Journal()
    second.add_directory(tmp_path)
    release(first, ledger, 2, block=10)
    release(second, ledger, 2, block=10)
    del first, second
    assert resumed(checkpoint, tmp_path).num_releases == 12


def test_ended_without_close_goes_on_in_the_same_process(tmp_path):
    """A journal that was dropped; another one takes up the ledger and its count."""
    first, ledger, checkpoint = started(tmp_path)
    release(first, ledger, 2, block=10)
    del first
    second = Journal()
    second.add_directory(tmp_path)
    release(second, ledger, 3, block=10)
    del second
    assert resumed(checkpoint, tmp_path).num_releases == 5


def test_a_clean_end_leaves_nothing_in_memory(tmp_path, memory):
    journal, ledger, _ = started(tmp_path)
    for _ in range(2):
        release(journal, ledger, 1, block=10)
        assert len(list(memory.iterdir())) == 1
        journal.close(ledger)
        assert list(memory.iterdir()) == []
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_keeps_a_record_of_its_own(tmp_path, copied):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 2, block=10)
    others, theirs = copied((journal, ledger))
    release(others, theirs, 3, block=10)
    release(journal, ledger, 4, block=10)
    others.close(theirs)
    del journal
    assert theirs.num_releases == 5
    assert resumed(checkpoint, tmp_path).num_releases == 2 + 3 + 4


def in_fork(work) -> None:
    """Run ``work`` in a forked process, which is then killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_forked_process_keeps_a_record_of_its_own(tmp_path):
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 2, block=10)
    in_fork(lambda: release(journal, ledger, 3, block=10))
    in_fork(lambda: journal.close(ledger))  # it has made nothing, so nothing of its parent's may change
    assert resumed(checkpoint, tmp_path).num_releases == 10 + 3
    release(journal, ledger, 4, block=10)
    journal = None
    assert resumed(checkpoint, tmp_path).num_releases == 6 + 3


def test_a_child_that_outlives_the_process_does_not_keep_it_alive(tmp_path):
    """As a dataloader's worker, which notices after seconds only that it is alone."""
    journal, ledger, checkpoint = started(tmp_path)
    release(journal, ledger, 2, block=10)
    begun, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        time.sleep(600)
        os._exit(0)
    os.read(begun, 1)
    os.close(begun)
    os.close(tell)
    del journal
    try:
        assert resumed(checkpoint, tmp_path).num_releases == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("ahead", "why"),
    [
        ({"own": "a"}, "does not say"),
        ({"own": 3, "ahead": None}, "does not say"),
        ({"own": "a", "ahead": [3]}, "no number of releases"),
        ({"own": "a", "ahead": KINDS[0].as_row(4)}, "more is reserved than there is"),
        ({"own": "a", "ahead": KINDS[1].as_row(1)}, "more is reserved than there is"),
        ({"own": "b", "ahead": KINDS[0].as_row(1)}, "more is reserved than there is"),
    ],
)
def test_corrupt_reservation_is_not_ignored(tmp_path, ahead, why):
    state = {"version": 2, "segments": {"a": [KINDS[0].as_row(3)]}}
    (tmp_path / "privacy-journal-a.json").write_text(json.dumps({**state, **ahead}))
    with pytest.raises(PrivacyError, match=rf"privacy-journal-a\.json cannot be read \(.*{why}"):
        Journal.read(tmp_path, Ledger())


# ---- real processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 1, 40])
def test_killed_runs_forget_nothing(tmp_path, monkeypatch, block):
    """Resumed from any of its checkpoints, old or new, a run knows what was witnessed, and one more for each kill."""
    monkeypatch.undo()  # the memory is the machine's
    forks, chance, made = fork_server(monkeypatch), random.Random(block), tmp_path / "made"
    made.touch()
    directory, checkpoint = tmp_path / "checkpoints", None
    directory.mkdir()
    for kill in range(1, 4):
        process = forks.Process(target=run, args=(checkpoint, directory, made, block, 37))
        before, deadline = made.stat().st_size, time.monotonic() + 240
        process.start()
        while made.stat().st_size == before:
            assert time.monotonic() < deadline, "the run made no release"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        assert process.exitcode is None, "the run ended by itself"
        process.kill()
        process.join()
        checkpoints = sorted(directory.glob("checkpoint-*.json"))
        for candidate in [checkpoints[0], chance.choice(checkpoints), checkpoints[-1]]:
            ledger = resumed(json.loads(candidate.read_text()), directory)
            assert made.stat().st_size <= ledger.num_releases <= made.stat().st_size + kill
        checkpoint = chance.choice(checkpoints)
    for segment in ledger.segment_ids:
        exact_count._path(segment).unlink(missing_ok=True)
