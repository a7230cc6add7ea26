"""What is read of the memory: files of the system that are written here, and a peak that is known."""

import sys

import pytest
import torch

from lightning_dp.strategies import memory
from lightning_dp.strategies.memory import DeviceMemory, HostMemory, is_out_of_memory, memory_of, shown

KB, MB = 1024, 10**6
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux tells")


def system(path, groups="", **files):
    """Write the files of a system with 1000 KB available, and return its memory."""
    (path / "proc/self").mkdir(parents=True)
    (path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    (path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = path / "groups" / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return HostMemory(path / "proc", path / "groups")


def test_what_is_available(tmp_path):
    assert system(tmp_path).free() == 1000 * KB


@pytest.mark.parametrize(
    ("limit", "usage", "files", "expected"),
    [("500000", "100000", 0, 400_000), ("500000", "400000", 150_000, 250_000), ("max", "1", 0, 1000 * KB)],
)
@pytest.mark.parametrize("group", ["job/step", "job", ""])
def test_a_limit_of_a_control_group_or_of_one_around_it(tmp_path, limit, usage, files, expected, group):
    at = f"{group.replace('/', '__')}__" if group else ""
    memory = system(
        tmp_path,
        "0::/job/step\n",
        **{
            f"{at}memory_dot_max": f"{limit}\n",
            f"{at}memory_dot_current": f"{usage}\n",
            f"{at}memory_dot_stat": f"anon 1\ninactive_file {files}\nactive_file 7\n",
        },
    )
    assert memory.free() == expected


def test_the_first_version_of_control_groups(tmp_path):
    memory = system(
        tmp_path,
        "5:devices:/other\n4:cpu,memory:/job\n0::/\n",
        memory__job__memory_dot_limit_in_bytes="300000",
        memory__job__memory_dot_usage_in_bytes="250000",
        memory__job__memory_dot_stat="inactive_file 3\ntotal_inactive_file 50000",
        memory__memory_dot_limit_in_bytes="9223372036854771712",
        memory__memory_dot_usage_in_bytes="1",
    )
    assert memory.free() == 100_000


@LINUX
def test_the_peak_of_what_is_held_for_a_moment():
    host = HostMemory()

    def hold(size):
        torch.ones(size, dtype=torch.uint8)

    hold(100 * MB)  # an earlier peak, which does not count
    for size in (20 * MB, 60 * MB):
        assert host.peak_of(lambda size=size: hold(size)) == pytest.approx(size, rel=0.1)
    assert host.peak_of(lambda: None) < MB
    kept = []
    assert host.peak_of(lambda: kept.append(torch.ones(30 * MB, dtype=torch.uint8))) == pytest.approx(30 * MB, rel=0.1)


@LINUX
def test_what_is_free_falls_by_what_is_held():
    host, falls = HostMemory(), []
    for _ in range(5):  # other processes come and go
        before = host.free()
        held = torch.ones(400 * MB, dtype=torch.uint8)
        falls.append(before - host.free())
        assert held.all()
        del held
    assert max(falls) > 200 * MB


@LINUX
def test_the_memory_of_the_cpu():
    assert isinstance(memory_of(torch.device("cpu")), HostMemory)


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "HostMemory", lambda: HostMemory(tmp_path, tmp_path))
    assert memory_of(torch.device("cpu")) is None
    assert memory_of(torch.device("mps")) is None


def test_the_memory_of_a_cuda_device(monkeypatch):
    """torch keeps 30 in reserve and uses 20 of it; the driver has 50 of 100."""
    peak = {"now": 90}
    told = {
        "mem_get_info": (50, 100),
        "memory_reserved": 30,
        "memory_allocated": 20,
        "synchronize": None,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(now=20))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["now"])
    device = memory_of(torch.device("cuda:0"))
    assert isinstance(device, DeviceMemory)
    assert device.free() == 60
    assert device.peak_of(lambda: peak.update(now=45)) == 25
    assert device.peak_of(lambda: None) == 0


def test_cleaning_up_gives_back_the_reserve(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    DeviceMemory(torch.device("cuda")).clean_up()
    assert calls == [1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (MemoryError("Unable to allocate 8 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_real_request_that_cannot_be_met():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(("number", "expected"), [(1.3e9, "1.3 GB"), (25_000_000, "25 MB"), (10, "under 1 MB")])
def test_bytes_in_words(number, expected):
    assert shown(number) == expected
