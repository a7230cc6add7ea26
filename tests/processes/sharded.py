"""What a process of a world with sharded parameters does; every function can be pickled, and returns plain values.

A world takes seconds to begin, so each does many things one after the other: see `updates` and `checkpoints`.
"""

import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

import lightning_dp as ldp
from tests.models import Regression, loader, trainer
from tests.processes.fits import kill

N = 12

ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)
"""Whether FSDP2 runs on CPUs, too."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(7, 7), nn.LayerNorm(7)

    def forward(self, x):
        return x + self.norm(F.relu(self.first(x), inplace=True))


class Net(nn.Module):
    """Has rows that no number of processes divides, a weight used twice and functions of parameters."""

    def __init__(self):
        super().__init__()
        self.inner, self.blocks = nn.Linear(3, 7), nn.ModuleList([Block(), Block()])
        self.up, self.down = nn.Parameter(torch.randn(7, 2) / 2), nn.Parameter(torch.randn(2, 7) / 2)
        self.outer = nn.Linear(7, 2)

    def forward(self, x):
        h = self.inner(x)
        for block in self.blocks:
            h = block(h)
        h = h + F.linear(h, self.up @ self.down)
        return self.outer(h) + F.linear(h, self.inner.weight[:, :2].t().exp())


def network():
    return Net().double()


def network_in_32_bits():
    return Net()


class Sharded(Regression):
    """Shards blocks and the whole, of weights that every process has drawn by itself: the whole is mixed of them."""

    def __init__(self, build=network, policy=None, trained="", **settings):
        super().__init__(build(), **settings)
        self.policy, self.trained = policy or MixedPrecisionPolicy(), trained
        self.outputs = next(self.parameters()).dtype

    def configure_model(self):
        if isinstance(self.net, FSDPModule):
            return  # of an earlier fit, as Lightning asks for
        for name, p in self.named_parameters():
            p.requires_grad_(self.trained in name)
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=self.policy)
        fully_shard(self.net, mesh=mesh, mp_policy=replace(self.policy, output_dtype=self.outputs))

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Noisy(Sharded):
    """A gradient of zero: an update is noise alone."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net(batch[0]).mean()


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.blocks = nn.Linear(3, 101), nn.ModuleList([nn.Linear(101, 101) for _ in range(4)])

    def forward(self, x):
        return nn.Sequential(self.inner, *self.blocks)(x)


def whole(module):
    """All parameters, gathered."""
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in module.named_parameters()
    }


class Watch(pl.Callback):
    """Notes the weights before the first step and the draws, or decides what is drawn."""

    def __init__(self, dp, forced=()):
        self._dp, self._forced, self.draws, self.start = dp, list(forced), [], {}

    def on_train_start(self, trainer, pl_module):
        self.start = whole(pl_module)
        loader = self._dp._run.loader
        draw = loader.draw

        def noting_draw(rate, random=None):
            found = draw(rate, random)
            self.draws.append(self._forced.pop(0) if self._forced else found)
            return self.draws[-1]

        loader.draw = noting_draw


def fit(
    size,
    module=None,
    steps=2,
    expected=N,
    forced=(),
    dtype=torch.float64,
    strategy=None,
    ckpt_path=None,
    callbacks=(),
    **settings,
):
    """Fit, with an expected batch of so many examples in all; return weights, draws and facts."""
    module = Sharded() if module is None else module
    dp = ldp.DPFSDPStrategy(**{"noise_multiplier": 0, "max_physical_batch_size": 2, **(strategy or {})})
    watch = Watch(dp, forced)
    data = loader(n=N, batch_size=expected // size, dtype=dtype)
    made = trainer(dp, max_steps=steps, devices=size, callbacks=[watch, *callbacks], **settings)
    made.fit(module, data, ckpt_path=ckpt_path)
    found = {
        "start": as_lists(watch.start),
        "end": as_lists(whole(module)),
        "draws": watch.draws[:steps],
        "kinds": sorted({f"{type(p).__name__} {p.dtype}" for p in module.parameters()}),
        "rate": dp.sample_rate,
        "releases": dp.num_releases,
        "epsilon": dp.epsilon,
    }
    return found, made, module


def as_lists(parameters):
    return {name: p.tolist() for name, p in parameters.items()}


FORCED = [[], [3], list(range(N)), [0, 5, 6, 7, 11], []]
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def updates(size):
    """Fits of many kinds, by name."""

    def of(**settings):
        return fit(size, **settings)[0]

    return {
        "flat": of(),
        "empty draws": of(expected=4, forced=FORCED, steps=len(FORCED)),
        "per layer": of(strategy={"clipping": "per_layer", "max_grad_norm": 0.5}),
        "biases": of(module=Sharded(trained="bias")),
        "16 bits": of(module=Sharded(network_in_32_bits, BF16), dtype=torch.float32),
        "noise": of(
            module=Noisy(Wide, lr=0.3),
            steps=1,
            dtype=torch.float32,
            strategy={"noise_multiplier": 1.5, "max_grad_norm": 0.7},
        ),
    }


def by_hand(found, expected=N, max_grad_norm=1.0, trained="", per_layer=False, cast=None, optimizer=torch.optim.SGD):
    """The weights after the same draws: a loop of autograd.grad over the samples, one by one in one process."""
    dtype = torch.float64 if cast is None else torch.float32
    start = {name: torch.tensor(p, dtype=dtype) for name, p in found["start"].items()}
    module = Net().to(dtype)
    weights = {name.removeprefix("net."): p.requires_grad_(trained in name) for name, p in start.items()}
    step_by = optimizer([p for p in weights.values() if p.requires_grad], lr=1.0)
    x, y = loader(n=N, batch_size=1, dtype=dtype).dataset.tensors
    for draw in found["draws"]:
        trained_ones = {name: p for name, p in weights.items() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in trained_ones.items()}
        for i in draw:
            used = {name: p.to(cast or dtype) for name, p in weights.items()}
            output = functional_call(module, used, x[i : i + 1].to(cast or dtype)).to(dtype)
            gradients = torch.autograd.grad(F.mse_loss(output, y[i : i + 1]), list(trained_ones.values()))
            layers = {}
            for name, g in zip(trained_ones, gradients, strict=True):
                layers.setdefault(name.rpartition(".")[0] if per_layer else "", []).append((name, g))
            for layer in layers.values():
                norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in layer))
                for name, g in layer:
                    total[name] += g * min(1.0, max_grad_norm / math.sqrt(len(layers)) / norm)
        for name, p in trained_ones.items():
            p.grad = total[name] / expected
        step_by.step()
    return {f"net.{name}": p.detach() for name, p in weights.items()}


def checkpoints(size, directory, saves_shards, first_steps, steps):
    """Go on from the checkpoint that is there, if there is one, and leave one; look at the rest of a trainer's life."""
    path = Path(directory) / "last.ckpt"
    found, made, module = fit(
        size,
        module=Sharded(optimizer=torch.optim.Adam),
        steps=steps,
        strategy={"save_distributed_checkpoint": saves_shards, "noise_multiplier": 0},
        ckpt_path=str(path) if first_steps else None,
    )
    made.save_checkpoint(path)
    data = loader(n=N, batch_size=3, shuffle=False, dtype=torch.float64)
    found["validated"] = made.validate(module, data, verbose=False)[0]["val_loss"]
    found["tested"] = made.test(module, data, verbose=False)[0]["val_loss"]
    found["predicted"] = torch.cat(made.predict(module, data)).shape[0]
    found["is directory"] = path.is_dir()
    return found


class Dying(Sharded):
    """Is killed in one process: where the others gather what it holds, or where a step has been released."""

    def __init__(self, moment, step=2):
        super().__init__()
        self.moment, self.step = moment, step

    def _dies(self, moment):
        return (moment, self.trainer.global_rank, self.trainer.global_step) == (self.moment, 1, self.step)

    def on_train_batch_start(self, batch, batch_idx):
        if self._dies("before a step"):
            kill()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self._dies("in a backward pass"):
            loss.register_hook(lambda gradient: kill())
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self._dies("in an optimizer's step"):
            kill()


def killed(moment, folder):
    """A fit in which one of two processes is killed; the checkpoint is that after the second step."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2)
    fit(2, Dying(moment), steps=6, strategy=dict(SPENT), forced=[list(range(N))] * 6, callbacks=[saving])


def gone_on(folder):
    """Go on from the checkpoint of the fit that was killed."""
    (path,) = Path(folder).glob("*.ckpt")
    found, _, _ = fit(1, Sharded(), steps=4, strategy=dict(SPENT), ckpt_path=str(path))
    return path.name, found["releases"], found["epsilon"]


SPENT = {"noise_multiplier": 5.0, "target_delta": 1e-3}


class Manual(Sharded):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Unsharded(Sharded):
    def configure_model(self):
        pass


class Loose(Sharded):
    """Trains a parameter that no part with shards holds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))


class Replicated(Sharded):
    """Shards over one axis of a mesh of two."""

    def configure_model(self):
        fully_shard(self.net, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))


class TensorParallel(Sharded):
    """Has a weight that is cut for another reason."""

    def configure_model(self):
        weight = distribute_tensor(self.net.outer.weight.detach(), self.device_mesh["data_parallel"], [Shard(0)])
        self.net.outer.weight = nn.Parameter(weight)
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net.inner, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net.blocks.parameters(), self.net.outer.weight], lr=1.0)


class Flattened(Sharded):
    def configure_model(self):
        self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"))


class Writing(Sharded):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.blocks[0].first.weight.mul_(0.9)
        return super().training_step(batch, batch_idx)


class Coupled(Sharded):
    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        return ((output - output.mean(0)) * batch[1]).sum(1).mean()


class Branching(Sharded):
    """Uses a weight in one more function from the second step on."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net(x)
        if self.trainer.global_step:
            output = torch.addcmul(output, y, self.net.outer.bias)
        return F.mse_loss(output, y)


class WithWhole(Sharded):
    """Shards for a strategy that has no mesh."""

    def configure_model(self):
        fully_shard(self.net, mesh=init_device_mesh("cpu", (1,)))


REFUSED = [Manual, Unsharded, Loose, Replicated, TensorParallel, Flattened, Writing, Coupled, Branching, WithWhole]


def refusals():
    """What fits are refused with, by the name of the module; the process group is there after the first."""
    found = {}
    for kind in REFUSED:
        try:
            if kind is WithWhole:
                trainer(ldp.DPStrategy(noise_multiplier=0)).fit(kind(), loader(dtype=torch.float64))
            fit(1, kind(), steps=2)
        except ldp.PrivacyError as error:
            found[kind.__name__] = f"{type(error).__name__}: {error}"
    return found
