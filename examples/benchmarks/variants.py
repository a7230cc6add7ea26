"""The ways to train a workload: ordinary, private with this library, private with Opacus."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from workloads import Workload, adamw

import lightning_dp as ldp
from lightning_dp.benchmarking import Baton, Facts
from lightning_dp.benchmarking.child import Training
from lightning_dp.benchmarking.fits import Variant

VARIANTS = ("plain", "dp", "plain_bias", "dp_bias", "plain_linear", "opacus", "opacus_ghost")
PAIRS = (
    ("dp", "plain"),
    ("dp_bias", "plain_bias"),
    ("dp_bias", "plain"),
    ("dp_bias", "opacus"),
    ("dp_bias", "opacus_ghost"),
    ("opacus", "plain_linear"),
    ("opacus_ghost", "plain_linear"),
    ("opacus", "plain"),
    ("opacus_ghost", "plain"),
)
"""What is compared, of what was measured."""


@dataclass(frozen=True)
class Fit:
    """A fit of a workload by Lightning."""

    workload: Workload
    variant: Variant
    accelerator: str
    precision: str
    linear: bool = False

    def __call__(self, baton: Baton) -> None:
        settings = {
            "accelerator": self.accelerator,
            "devices": 1,
            "precision": self.precision,
            "strategy": ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=self.workload.physical),
            "callbacks": [ldp.PrivacyMonitor(summary=False)],
        }
        _import_models(self.workload)
        baton.imports_done()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.variant.trainer(pl.Trainer, settings, folder, baton)
            trainer.fit(self.workload.module(self.linear), self.workload.dataloader())


@dataclass(frozen=True)
class Opacus:
    """A plain loop with Opacus: its Poisson sampling, its physical batches, the same optimizer.

    It knows neither tied weights nor the layers of GPT-2, so it trains gpt2 of ``nn.Linear`` with an untied head. Its
    backward hooks do not go with what is written in place: activations are told not to, and a ResNet's blocks copy what
    they add the shortcut to.
    """

    workload: Workload
    ghost: bool
    accelerator: str
    precision: str

    def __call__(self, baton: Baton) -> None:
        from opacus import PrivacyEngine
        from opacus.utils.batch_memory_manager import BatchMemoryManager

        _import_models(self.workload)
        baton.imports_done()
        device = torch.device("cuda" if self.accelerator in ("cuda", "gpu") else self.accelerator)
        net = _without_in_place(self.workload.net(linear=True)).to(device)
        made = PrivacyEngine().make_private(
            module=net,
            optimizer=adamw(net),
            data_loader=self.workload.dataloader(),
            criterion=nn.CrossEntropyLoss(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost" if self.ghost else "hooks",
        )
        (module, optimizer, *_, loader), loss = made, made[2] if self.ghost else nn.CrossEntropyLoss()
        baton.ready(lambda: self._facts(device, net))
        limit = {"max_physical_batch_size": self.workload.physical, "optimizer": optimizer}
        with BatchMemoryManager(data_loader=loader, **limit) as batches:
            self._train(baton, module, optimizer, loss, _endless(batches, device))

    def _train(self, baton: Baton, module: Any, optimizer: Any, loss: Any, batches: Iterator[list[Tensor]]) -> None:
        count = examples = 0
        begins = True
        for x, y in batches:
            if begins:
                baton.wait(count, examples)
                count = examples = 0
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
                logits = module(x)
                # Ghost clipping must be told the shape, to make one loss of a sequence.
                shape = {"shape": logits.shape} if self.ghost and logits.dim() == 3 else {}
                value = loss(logits.flatten(0, -2), y.flatten(), **shape)
            value.backward()
            optimizer.step()
            begins = not optimizer._is_last_step_skipped  # the last physical batch of a logical one
            optimizer.zero_grad(set_to_none=True)
            count, examples = count + 1, examples + len(y)

    def _facts(self, device: torch.device, net: nn.Module) -> Facts:
        sizes = [(p.numel(), p.requires_grad) for p in net.parameters()]
        return Facts(
            device=str(device),
            physical_batch_size=self.workload.physical,
            num_physical=self.workload.num_physical,
            num_trained=sum(size for size, trained in sizes if trained),
            num_parameters=sum(size for size, _ in sizes),
        )


def training_of(name: str, workload: Workload, accelerator: str, precision: str, steps: int) -> Training:
    """Return a variant by its name.

    Args:
        name: One of `VARIANTS`.
        workload: What is trained.
        accelerator: Of Lightning.
        precision: Of Lightning.
        steps: How many steps it may be asked for.
    """
    if name.startswith("opacus"):
        return Opacus(workload, name == "opacus_ghost", accelerator, precision)
    private, bias_only = name.startswith("dp"), name.endswith("bias")
    sizes = {"batch_size": workload.physical, "num_physical": workload.num_physical}
    variant = Variant(private, bias_only, steps=steps, **sizes)
    return Fit(workload, variant, accelerator, precision, linear=name.endswith("linear"))


def _import_models(workload: Workload) -> None:
    """Import what the models are made of: no part of the memory of training."""
    if workload.name == "gpt2":
        from transformers import GPT2LMHeadModel  # noqa: F401
    else:
        import timm  # noqa: F401


def _without_in_place(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if getattr(module, "drop_path", module) is None:  # a block of timm's ResNet, which ends with x += shortcut
            module.drop_path = _Copied()
    return net


class _Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _endless(batches: Any, device: torch.device) -> Iterator[list[Tensor]]:
    while True:
        for batch in batches:
            yield [part.to(device) for part in batch]
