"""What a process of a world does; every function can be pickled, and returns plain values."""

import math
import os
import signal
import time
from contextlib import contextmanager
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp as ldp
from lightning_dp.noise import SecretRandom
from lightning_dp.processes import ProcessGroup
from tests.models import Regression, ZeroGradient, loader, parameters, trainer

N = 12


def network():
    """A network whose initial weights are those of the process's own seed."""
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2)).double()


class Collective(Regression):
    """Talks to the other processes in every training step, as users do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach(), sync_dist=True, on_step=True, on_epoch=True)
        assert self.all_gather(loss.detach()).numel() == self.trainer.world_size
        return loss


class TwoOptimizers(Regression):
    """Two optimizers, each of which steps in every training step."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:2].parameters(), lr=1.0), torch.optim.SGD(self.net[2:].parameters(), lr=1.0)]


class Watch(pl.Callback):
    """Notes initial weights, the draws, and what this process has of them."""

    def __init__(self):
        self.start, self.draws, self.shares, self.logged = {}, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.start = parameters(pl_module)
        loader = trainer.strategy._run.loader
        draw, units = loader.draw, loader.units
        examples_of = units.examples_of

        def noting_draw(rate, random=None):
            self.draws.append(draw(rate, random))
            self.shares.append([])
            return self.draws[-1]

        def noting_examples(chunk, random=None):
            if random is not None:  # otherwise samples that are looked at
                self.shares[-1].append(list(chunk))
            return examples_of(chunk, random)

        loader.draw, units.examples_of = noting_draw, noting_examples

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append(trainer.strategy.private_statistics)


def data_of(n, batch_size):
    return loader(n=n, batch_size=batch_size, dtype=torch.float64)


def fit(size, n=N, batch_size=N, steps=3, module=None, data=None, strategy=None, callbacks=(), **settings):
    """Fit without noise, with an expected batch of so many examples in all; return weights, draws and facts."""
    dp = ldp.DPStrategy(**{"noise_multiplier": 0, "max_physical_batch_size": 2, **(strategy or {})})
    watch, module = Watch(), module or Regression(network())
    settings = {"enable_checkpointing": False, **settings}  # Lightning's checkpoints have collectives of their own
    made = trainer(dp, max_steps=steps, devices=size, callbacks=[watch, *callbacks], **settings)
    made.fit(module, data or data_of(n, batch_size // size))
    return {
        "start": as_lists(watch.start),
        "end": as_lists(parameters(module)),
        "draws": watch.draws[:steps],
        "shares": watch.shares[:steps],
        "statistics": watch.logged,
        "facts": (dp.sample_rate, dp.num_releases, dp.epsilon, dp.max_grad_norm),
        "metrics": {name: float(value) for name, value in made.callback_metrics.items()},
        "physical": dp._run.loader.max_physical_batch_size,
    }


def as_lists(tensors):
    return {name: p.tolist() for name, p in tensors.items()}


def users(size):
    """Every user has two examples, and gives both."""
    x, y = data_of(N, 1).dataset.tensors
    owned = ldp.PrivateDataset(TensorDataset(x, y), user_ids=[k // 2 for k in range(N)], examples_per_user=2)
    return DataLoader(owned, batch_size=N // size)


def public(size, **settings):
    """Public steps on batches of 4 in all, always in the same order."""
    return ldp.PublicPretraining(loader(12, 4 // size, torch.float64, seed=1, shuffle=False), **settings)


def updates(size, only=()):
    """Fits of all kinds, or only some; each begins with weights that differ between the processes."""
    rank, found = int(os.environ.get("LOCAL_RANK", 0)), {}
    cases = {
        "whole": {},
        "few": {"n": 8, "batch_size": 4, "steps": 30, "strategy": {"max_physical_batch_size": 1}},
        "collectives": {"n": 8, "batch_size": 4, "steps": 8, "strategy": {"max_physical_batch_size": 1}},
        "automatic": {"strategy": {"clipping": "automatic"}},
        "per_layer": {"strategy": {"clipping": "per_layer"}},
        "adaptive": {"strategy": {"clipping": "adaptive"}},
        "statistics": {"strategy": {"private_statistics": True, "max_grad_norm": 3.0}},
        "auto": {"strategy": {"max_physical_batch_size": "auto"}},
        "manual": {"strategy": {"max_physical_batch_size": None}},
        "users": {"data": users(size)},
        "public first": {"steps": 6, "callbacks": [public(size, switch=0.5)]},
        "public until a plateau": {"steps": 6, "callbacks": [public(size, patience=1, min_delta=100.0, check_every=2)]},
        "public beside": {"steps": 4, "callbacks": [public(size, mix="cosine", switch=1.0)]},
    }
    for name, settings in cases.items():
        if only and name not in only:
            continue
        lr = {"lr": 0.1} if name.startswith("public") else {}  # public gradients are not clipped
        torch.manual_seed(1000 + rank)
        kind = {"collectives": Collective, "manual": TwoOptimizers}.get(name, Regression)
        found[name] = fit(size, module=kind(network(), **lr), **settings)
    return found


# ---- noise -------------------------------------------------------------------------------------------------------

NOISE, WIDTH = 2.0, 40_000


class Wide(ZeroGradient):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(WIDTH))


@contextmanager
def scaled_noise(factor):
    """Let every process add noise of another scale."""
    add = SecretRandom.add_normal

    def wrong(self, totals, std, divisor=1.0):
        add(self, totals, std * factor, divisor)

    with mock.patch.object(SecretRandom, "add_normal", wrong):
        yield


def noise(size):
    """The noise of one step: of all processes together, of this one alone, and with noise of a wrong scale."""
    own, add_up = [], ProcessGroup.add_up

    def noting(self, tensors, what=""):
        tensors = list(tensors)
        own.append(torch.cat([t.flatten() for t in tensors if t.numel() == WIDTH] or [torch.empty(0)]))
        add_up(self, tensors, what)

    def one_step(factor=1.0):
        module = Wide()
        dp = ldp.DPStrategy(noise_multiplier=NOISE)
        with scaled_noise(factor):
            trainer(dp, max_steps=1, devices=size).fit(module, loader(n=20, batch_size=4 // size))
        return (module.extra.detach().double() * 4).tolist()  # in units of the sum: expected batch 4, rate 1

    with mock.patch.object(ProcessGroup, "add_up", noting):
        together = one_step()
    return {
        "together": together,
        "own": (own[-1].double() * 4).tolist() if own else together,
        "once in each process": one_step(math.sqrt(size)),
        "too little": one_step(1 / math.sqrt(size)),
    }


# ---- what ends a fit -----------------------------------------------------------------------------------------------


class Breaking(Regression):
    """Does something in one training step of one process."""

    def __init__(self, action, rank=1, step=2):
        super().__init__(network())
        self.action, self.rank, self.step = action, rank, step

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_rank == self.rank and batch_idx == self.step:
            self.action()


def fail():
    raise ValueError("something of the user's")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def broken(action, folder=None):
    """A fit in which one process does something; the last checkpoint is that after the first step."""
    saving = (
        {} if folder is None else {"callbacks": [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)]}
    )
    dp = ldp.DPStrategy(noise_multiplier=5.0, target_delta=1e-3)
    trainer(dp, max_steps=6, devices=2, **saving).fit(Breaking(action), data_of(20, 2))


def broken_and_saved(action, folder):
    """The same, with a callback that saves a state at the end of every process."""
    dp = ldp.DPStrategy(noise_multiplier=5.0, target_delta=1e-3)
    saving = OnExceptionCheckpoint(folder, filename="ended")
    trainer(dp, max_steps=6, devices=2, callbacks=[saving]).fit(Breaking(action), data_of(20, 2))


def summed_while_another_fails():
    """What a process adds up while another one fails, by a sum that is not the library's: an error, or a result."""
    trainer(ldp.DPStrategy(noise_multiplier=1.0), devices=2).validate(Regression(), loader(), verbose=False)
    group, numbers = ProcessGroup(torch.device("cpu")), torch.ones(6)
    if group.is_first:
        group.fail(ValueError("something of the user's"))
        return None
    work = torch.distributed.all_reduce(numbers, async_op=True)
    time.sleep(2)
    return work.is_completed() and work.exception() is None


class Apart(Regression):
    """Uses something that neither a parameter nor a buffer holds, and that every process has drawn for itself."""

    def __init__(self, net):
        super().__init__(net)
        self.scale = torch.rand(3, dtype=torch.float64) + 0.5

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] * self.scale, batch[1]], batch_idx)


class Gathering(Regression):
    """Puts samples of the next process into its loss."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        every = self.all_gather(x).view(-1, *x.shape)
        return super().training_step([x + every[(self.global_rank + 1) % len(every)], y], batch_idx)


class Drifting(Regression):
    """Changes a weight of one process after the first step."""

    def on_train_batch_end(self, *args):
        if self.global_rank:
            with torch.no_grad():
                self.net[0].bias[0] += 1e-9


class Unordered(Regression):
    """Has its layers in an order that every process chooses."""

    def __init__(self, names):
        super().__init__(nn.ModuleDict({name: nn.Linear(3, 3).double() for name in names}))

    def training_step(self, batch, batch_idx):
        return sum(layer(batch[0]).square().mean() for layer in self.net.values())


class OwnOrder(TwoOptimizers):
    """Two optimizers of the same shapes, which step in the order that every process chooses."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double())

    def training_step(self, batch, batch_idx):
        losses = [self.net[0](batch[0]).square().mean(), self.net[1](batch[0]).square().mean()]
        pairs = list(zip(losses, self.optimizers(), strict=True))
        for loss, optimizer in reversed(pairs) if self.global_rank else pairs:
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1.0) for part in self.net]


def users_of(order):
    """Data of ten users with two examples each, of whom one process thinks otherwise."""
    data = data_of(20, 2).dataset
    users = ldp.PrivateDataset(data, user_ids=[k // 2 if order else k % 10 for k in range(20)], examples_per_user=2)
    return DataLoader(users, batch_size=2)


def parted():
    """The errors of fits whose processes have the same settings, and not the same data or model."""
    rank = int(os.environ["LOCAL_RANK"])
    rows = torch.arange(20).roll(rank)
    moved = DataLoader(TensorDataset(*(t[rows] for t in data_of(20, 2).dataset.tensors)), batch_size=2)
    settings = {
        "order of the data": {"data": moved},
        "users": {"data": users_of(rank)},
        "attribute": {"module": Apart(network())},
        "samples of others": {"module": Gathering(network())},
        "drift": {"module": Drifting(network())},
        "order of layers": {"module": Unordered(["a", "b"] if rank else ["b", "a"])},
        "order of optimizers": {"module": OwnOrder(), "strategy": {"max_physical_batch_size": None}},
        "nothing": {"module": Collective(network())},
    }
    return {name: error_of(each) for name, each in settings.items()}


def error_of(settings):
    try:
        fit(2, **{"data": data_of(20, 2), **settings})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def peeked():
    """Draws of a fit in which one process looks at a batch by itself, before the first step and in between."""

    class Peek(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            if trainer.global_rank:
                next(iter(trainer.train_dataloader))

    watch = Watch()
    made = trainer(
        ldp.DPStrategy(noise_multiplier=0.0, target_delta=1e-3), max_steps=4, devices=2, callbacks=[Peek(), watch]
    )
    made.fit(Regression(network()), data_of(8, 2))
    return watch.draws, as_lists(parameters(made.lightning_module))


def refused():
    """The errors of fits whose processes differ."""
    rank = int(os.environ["LOCAL_RANK"])
    bound = 1.0 + rank
    lazy = nn.Sequential(nn.LazyLinear(2)).double()
    settings = {
        "length": {"data": data_of(20 + rank, 2)},
        "batch_size": {"data": data_of(20, 2 + rank)},
        "max_grad_norm": {"strategy": {"max_grad_norm": bound}},
        "clipping": {"strategy": {"clipping": ldp.AutomaticClipping(bound)}},
        "check of one process": {"data": [1] if rank else data_of(20, 2)},
        "decided by the first": {"strategy": {"schedule": [ldp.Stage(1, batch_size_factor=100.0)]}},
        "module": {"module": Regression(nn.Linear(3, 2 + rank).double())},
        "lazy": {"module": Regression(lazy)},
    }
    found = {}
    for name, each in settings.items():
        try:
            fit(2, **{"data": data_of(20, 2), **each})
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    together = ProcessGroup(torch.device("cpu"))
    for name, act in {
        "sums of different steps": lambda: together.add_up([torch.ones(1)], f"step {rank}"),
        "told to nobody": lambda: together.decide(lambda: lambda: 1),
        "different collectives": lambda: together.gather(1) if rank else together.broadcast(1),
    }.items():
        try:
            act()
            found[name] = "no error"
        except ldp.PrivacyError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# ---- going on --------------------------------------------------------------------------------------------------------

EXPECTED, RESUMED_N, RESUMED_NOISE, RESUMED_DELTA = 4, 20, 3.0, 1e-3


def resumed(size, folder, max_steps, checkpoint=None, batch_size=None, **strategy):
    """Go on with a run; return what is known of it, before and after."""
    dp = ldp.DPStrategy(**{"noise_multiplier": RESUMED_NOISE, "target_delta": RESUMED_DELTA, **strategy})
    made = trainer(dp, max_steps=max_steps, devices=size, callbacks=[ModelCheckpoint(folder, filename="{step}")])
    made.fit(Regression(network()), data_of(RESUMED_N, batch_size or EXPECTED // size), ckpt_path=checkpoint)
    path = os.path.join(folder, f"to-{max_steps}.ckpt")
    made.save_checkpoint(path)
    counts = [
        (release.noise_multiplier, release.sample_rate, count) for release, count in dp._run.ledger.counts.items()
    ]
    return {"path": path, "epsilon": dp.epsilon, "counts": counts, "segments": sorted(dp._run.ledger.segment_ids)}


def resumed_by_two(folder, checkpoint):
    """Go on with a run on two processes, and try to do so with a batch size that is not adapted."""
    found = resumed(2, folder, 6, checkpoint)
    try:
        resumed(2, folder, 6, checkpoint, batch_size=EXPECTED)
        found["unadapted"] = "no error"
    except ldp.PrivacyError as error:
        found["unadapted"] = str(error)
    return found


# ---- without training ------------------------------------------------------------------------------------------------


class Evaluated(Regression):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean(), sync_dist=True)

    test_step = validation_step


def evaluated(size):
    """Validation, test and prediction without and after a fit."""
    torch.manual_seed(1000 + int(os.environ.get("LOCAL_RANK", 0)))
    module = Evaluated(network())
    data = DataLoader(data_of(N, 1).dataset, batch_size=N // size)
    made = trainer(ldp.DPStrategy(noise_multiplier=0), devices=size, limit_val_batches=1.0)
    found = {"validate": made.validate(module, data, verbose=False), "test": made.test(module, data, verbose=False)}
    found["predictions"] = [p.tolist() for p in made.predict(module, data)]
    made.fit(module, data, data)
    return {**found, "fit": float(made.callback_metrics["val_loss"])}
