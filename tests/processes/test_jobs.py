"""Jobs on machines that are taken away: signals from outside, SLURM's requeue, and torchrun's restarts.

The witness is not ours: the steps that the optimizer of the first process began to make.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes.world import free_port

SCRIPT = """
import os, signal, sys, time, torch
from pathlib import Path
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
import lightning_dp as ldp
from tests.models import Regression, loader, trainer
from tests.strategies.test_kills import Witnessed

folder, steps, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

class Slow(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (folder / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.02)
        first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if way == "restart" and first_time and trainer.global_rank == 1 and trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dp = ldp.DPStrategy(noise_multiplier=5.0, target_delta=1e-3)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_last=True)
    fit = trainer(dp, max_steps=steps, devices=2, callbacks=[Slow(), saving], default_root_dir=folder)
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", 0)))
    module = Regression(optimizer=lambda parameters, lr: Witnessed(parameters, lr, folder / f"made-{rank}"))
    fit.fit(module, loader(n=200, batch_size=5), ckpt_path="last" if way in ("restart", "last") else None)
    print(f"RESULT {dp.num_releases} {fit.global_step}")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
LONG = 300  # seconds; the process group would wait for 30 minutes


class Job:
    """A script that trains without end, or so many steps more than were made, in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        (folder / "script.py").write_text(SCRIPT)

    def start(self, command=(sys.executable,), way="", steps=1_000_000, **environment):
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
        arguments = [*command, str(self.folder / "script.py"), str(self.folder), str(steps), way]
        with open(self._told(len(self.started)), "wb") as told:
            process = subprocess.Popen(arguments, env=environment, stdout=told, start_new_session=True)
        self.started.append(process)
        return process

    def _told(self, k):
        return self.folder / f"told-{k}"

    def end(self):
        """Leave nothing running, whatever has failed; torchrun ends its processes, which have sessions of their own."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
            process.wait(LONG)

    def start_tasks(self, job, **settings):
        """Start what `srun --ntasks-per-node=2` starts, where `scontrol` only notes what it is told."""
        scontrol = self.folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/requeued\n')
        scontrol.chmod(0o755)
        common = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0, "JOB_ID": job, "JOB_NAME": "train"}
        common = {"NODELIST": "127.0.0.1", **common}
        path, port = f"{self.folder}{os.pathsep}{os.environ['PATH']}", str(free_port())
        tasks = []
        for rank in range(2):
            task = {f"SLURM_{name}": str(value) for name, value in {**common, "PROCID": rank, "LOCALID": rank}.items()}
            tasks.append(self.start(PATH=path, MASTER_PORT=port, **task, **settings))
        return tasks

    def pids(self):
        """Those of both processes, once they are training."""
        files = [self.folder / f"pid-{rank}" for rank in range(2)]
        _until(lambda: all(f.exists() and f.read_text() for f in files) and self.made() > 3)
        return [int(f.read_text()) for f in files]

    def made(self, rank=0):
        file = self.folder / f"made-{rank}"
        return len(file.read_bytes()) if file.exists() else 0

    def result(self, process):
        """What the script has printed: releases and steps."""
        assert process.wait(LONG) == 0
        told = self._told(self.started.index(process)).read_text()
        return [tuple(map(int, line.split()[1:])) for line in told.splitlines() if line.startswith("RESULT")]


def _until(condition):
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path)
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.parametrize("command", [(sys.executable,), TORCHRUN], ids=["popen", "torchrun"])
@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_process_that_is_told_to_end_ends_all_and_the_next_run_counts_every_step(command, ranks, job):
    process = job.start(command)
    pids = job.pids()
    for rank in ranks:
        os.kill(pids[rank], signal.SIGTERM)
    assert job.result(process) == []
    made = job.made()
    assert job.made(1) == made
    last = int(next(job.folder.glob("step=*.ckpt")).stem.removeprefix("step="))
    results = job.result(job.start(command, "last", steps=last + 3))
    assert results == [(made + 3, last + 3)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_requeue_by_slurm_saves_the_same_step_of_all_and_forgets_nothing(ranks, job):
    tasks = job.start_tasks(1234)
    job.pids()
    for rank in ranks:
        tasks[rank].send_signal(signal.SIGUSR1)
    _until((job.folder / "requeued").exists)
    assert (job.folder / "requeued").read_text() == "requeue 1234\n"
    for task in tasks:  # as SLURM ends a job
        task.send_signal(signal.SIGTERM)
    assert [job.result(task) for task in tasks] == [[], []]
    made = job.made()
    assert job.made(1) == made
    results = [job.result(task) for task in job.start_tasks(1235, steps=made + 5)]
    ((releases, steps),) = results[0]
    assert results == [[(releases, made + 5)]] * 2
    assert releases == job.made()
    assert steps < releases  # those after the checkpoint were made again


@pytest.mark.slow
def test_torchrun_starts_all_again_and_what_was_released_before_counts(job):
    # Without it torchrun keeps the addresses of the processes before, to which Gloo may try to connect.
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    results = job.result(job.start([*TORCHRUN, "--max-restarts=1"], "restart", steps=12, **settings))
    made = job.made()
    assert made >= 14  # 7 before, and those from 5 to 12
    # One more may be booked: that which waited for the process that had died.
    assert results in ([(made, 12)] * 2, [(made + 1, 12)] * 2)
