"""Fits that a signal ends, and tensors of all types; every function can be pickled."""

import os
import signal
from pathlib import Path

import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_dp as ldp
from lightning_dp.processes import ProcessGroup
from tests.models import Regression, loader, trainer
from tests.processes import fits

STEP = 2


class Signalled(Regression):
    """Sends itself a signal in some processes: before a training step, or in a validation after it."""

    def __init__(self, number, ranks, where="step"):
        super().__init__(fits.network())
        self.number, self.ranks, self.where = number, ranks, where

    def receive(self, where):
        if where == self.where and self.trainer.global_rank in self.ranks:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)  # who ends a job may be impatient

    def on_train_start(self):
        self.receive("start")

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == STEP:
            self.receive("step")

    def on_train_end(self):
        self.receive("end")

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step == STEP:
            self.receive("validation")


def ended(folder, ranks, where="step", size=2):
    """Return how a fit ended, and after which step and release, in this process."""
    handlers = signal.getsignal(signal.SIGTERM)
    dp = ldp.DPStrategy(noise_multiplier=fits.RESUMED_NOISE, target_delta=fits.RESUMED_DELTA)
    saving = OnExceptionCheckpoint(folder, filename="ended")
    settings = {"limit_val_batches": 1, "val_check_interval": STEP} if where == "validation" else {}
    made = trainer(dp, max_steps=5, devices=size, callbacks=[saving], **settings)
    data, how = fits.data_of(fits.RESUMED_N, 2), "went on"
    try:
        made.fit(Signalled(signal.SIGTERM, ranks, where), data, data if settings else None)
    except SIGTERMException:
        how = "ended"
    return how, made.global_step, dp.num_releases, signal.getsignal(signal.SIGTERM) == handlers


def resumed(folder):
    """Go on from the state that was saved at the end; return all releases that are known."""
    return fits.resumed(1, folder, 6, str(Path(folder) / "ended.ckpt"))["counts"]


TYPES = (torch.bool, torch.int16, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.float64)
LARGE = 60_000.0  # in float16 twice as much is infinite


def of_all_types():
    """Tensors of every kind that a module may have, and what the mean of gradients in 16 bits is."""
    rank = int(os.environ["LOCAL_RANK"])
    trainer(ldp.DPStrategy(noise_multiplier=1.0), devices=2).validate(Regression(), loader(), verbose=False)
    group = ProcessGroup(torch.device("cpu"))
    tensors = {str(dtype): (torch.arange(6).view(2, 3).t() + rank).to(dtype) for dtype in TYPES}
    tensors["scalar"] = torch.tensor(rank + 1)
    group.share(tensors)
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))
    parameter.grad = torch.full((1,), LARGE, dtype=torch.float16)
    group.average_gradients([parameter])
    return {name: t.to(torch.complex64).tolist() for name, t in tensors.items()}, parameter.grad.item()
