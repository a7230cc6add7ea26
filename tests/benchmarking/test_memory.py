"""The peak of memory, against blocks of known size."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_dp.benchmarking import memory
from lightning_dp.benchmarking.memory import PeakMemory

MEBIBYTE = 2**20
CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")


def hold(mebibytes):
    torch.ones(mebibytes * MEBIBYTE // 4).sum()


@on_linux
def test_the_peak_is_that_since_the_reset():
    measuring = PeakMemory()
    measuring.note_level()
    hold(400)
    measuring.reset(CPU)
    hold(100)
    found = measuring.measured()
    assert 50 * MEBIBYTE < found.for_training < 300 * MEBIBYTE  # some of it may lie in what the process held before
    assert found.for_training == found.peak - found.level
    assert "after the warm-up" in found.source


@on_linux
@pytest.mark.parametrize("absent", [("_CLEAR",), ("_CLEAR", "_STATUS")])
def test_without_a_reset_the_peak_is_that_of_the_whole_process_and_says_so(absent, monkeypatch, tmp_path):
    for name in absent:
        monkeypatch.setattr(memory, name, tmp_path / "nowhere" / "file")
    measuring = PeakMemory()
    hold(100)
    measuring.reset(CPU)
    found = measuring.measured()
    assert found.peak >= 100 * MEBIBYTE
    assert "warm-up included" in found.source


def test_a_system_that_tells_nothing_has_no_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "file")
    monkeypatch.setitem(sys.modules, "resource", None)
    measuring = PeakMemory()
    measuring.reset(CPU)
    assert measuring.measured() is None


def test_on_a_gpu_it_is_that_of_torchs_allocator(monkeypatch):
    reset = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset.append)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 123)
    measuring = PeakMemory()
    measuring.reset(torch.device("cuda:0"))
    found = measuring.measured()
    assert reset == [torch.device("cuda:0")]
    assert (found.peak, found.for_training, found.source) == (123, 123, "torch.cuda.max_memory_allocated")
