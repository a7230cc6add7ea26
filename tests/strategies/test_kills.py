"""A real fit, killed without warning at random moments and resumed each time: no optimizer step is ever forgotten.

The witness is not ours: a byte for each step that an optimizer began to make, appended by the optimizer itself once it
has its gradients and before it changes a parameter.
"""

import logging
import multiprocessing
import os
import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dp as ldp
from lightning_dp.accounting import exact_count
from tests.accounting.crash import fork_server
from tests.accounting.oracles import pld_epsilon
from tests.models import ZeroGradient, loader, trainer

NOISE, RATE, DELTA = 5.0, 0.25, 1e-3  # loader(): 5 of 20


class Witnessed(torch.optim.SGD):
    def __init__(self, parameters, lr, file):
        super().__init__(parameters, lr=lr)
        self.file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self, closure=None):
        def and_tell():
            result = closure()
            os.write(self.file, b"x")
            return result

        return super().step(and_tell)


def fit(made, folder, checkpoint=None, max_steps=1_000_000, every=7):
    def optimizer(parameters, lr):
        return Witnessed(parameters, lr, made)

    strategy = ldp.DPStrategy(noise_multiplier=NOISE, target_delta=DELTA)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    run = trainer(strategy, max_steps=max_steps, callbacks=[saving])
    run.fit(ZeroGradient(optimizer=optimizer), loader(), ckpt_path=checkpoint)
    return run


def quiet_fit(*args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning_dp"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    fit(*args)


@dataclass
class Run:
    """Everything on disk, and what is known of it from outside."""

    made: Path
    folder: Path
    chance: random.Random
    forks: multiprocessing.context.ForkServerContext

    @property
    def witnessed(self):
        return self.made.stat().st_size

    def checkpoints(self):
        return sorted(self.folder.glob("*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def some_checkpoint(self):
        """The latest one, or any older one."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if self.chance.random() < 0.5 else self.chance.choice(checkpoints)

    def kill_once(self, moment):
        process = self.forks.Process(target=quiet_fit, args=(self.made, self.folder, self.some_checkpoint()))
        witnessed, saved = self.witnessed, len(self.checkpoints())
        process.start()
        if moment == "step":
            wait(process, lambda: self.witnessed > witnessed)
            time.sleep(self.chance.uniform(0, 2.0))
        elif moment == "checkpoint":
            wait(process, lambda: len(self.checkpoints()) > saved)
            time.sleep(self.chance.uniform(0, 0.01))
        else:
            time.sleep(self.chance.uniform(0, 1.5))
        assert process.exitcode is None, "the run ended by itself"
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def forks(monkeypatch):
    return fork_server(monkeypatch)


def wait(process, condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.exitcode is None, "the run ended by itself"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.0005)


def killed_again_and_again(tmp_path, forks, moments, seed):
    """The run, and the strategy that resumes it for one more step."""
    run = Run(tmp_path / "made", tmp_path / "checkpoints", random.Random(seed), forks)
    fit(run.made, run.folder, max_steps=1, every=1)
    for moment in moments:
        run.kill_once(moment)
    checkpoint = run.some_checkpoint()
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    resumed = fit(run.made, run.folder, checkpoint, done + 1).strategy
    for path in run.folder.glob("privacy-journal-*.json"):
        exact_count._path(path.stem.rpartition("-")[2]).unlink(missing_ok=True)
    return run, resumed


def check(run, resumed, kills):
    """Between what was witnessed and, for each kill, one release that was booked and then not made."""
    assert run.witnessed <= resumed.num_releases <= run.witnessed + kills
    spent = pld_epsilon([(RATE, NOISE, run.witnessed)], DELTA)
    assert spent <= resumed.epsilon
    return spent


def test_a_killed_run_forgets_nothing(tmp_path, forks):
    run, resumed = killed_again_and_again(tmp_path, forks, ["step", "checkpoint", "start"], seed=0)
    check(run, resumed, kills=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fifty_kills(tmp_path, forks):
    moments = random.Random(1).choices(["step", "checkpoint", "start"], [3, 1, 1], k=50)
    run, resumed = killed_again_and_again(tmp_path, forks, moments, seed=2)
    spent = check(run, resumed, kills=50)
    assert resumed.epsilon <= 1.02 * spent
    print(f"{run.witnessed} steps witnessed, {resumed.num_releases} reported, epsilon {resumed.epsilon / spent:.4f}")
