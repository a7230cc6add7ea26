"""The named workloads: models with random weights, and random data. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY, CLASSES = 50257, 1000
_HEAD_WIDTH = 64
_POOL = 64  # different examples; the data set repeats them, so that it needs no memory


@dataclass(frozen=True)
class Workload:
    """A model and its data.

    Args:
        name: ``"gpt2"``, ``"vit"``, ``"resnet50"`` or ``"resnet152"``.
        physical: Examples in a physical batch.
        length: Tokens of an example of gpt2.
        pixels: Height and width of an image.
        layers: Of gpt2.
        width: Of gpt2.
        num_physical: Physical batches in a logical one.
    """

    name: str
    physical: int
    length: int = 128
    pixels: int = 224
    layers: int = 12
    width: int = 768
    num_physical: int = 8

    @property
    def title(self) -> str:
        """What it is, in a line."""
        what = f"{self.pixels} pixels"
        if self.name == "gpt2":
            what = f"{self.layers} layers, width {self.width}, T={self.length}"
        return f"{self.name}, {what}, physical batch {self.physical}, {self.num_physical} of them in a step"

    @property
    def batch_size(self) -> int:
        """Of a logical batch, as expected."""
        return self.physical * self.num_physical

    def module(self, linear: bool = False) -> pl.LightningModule:
        """Return the model as a LightningModule; ``linear``: gpt2 of ``nn.Linear`` with an untied head."""
        return Task(self.net(linear))

    def net(self, linear: bool = False) -> nn.Module:
        if self.name == "gpt2":
            if linear:
                return LinearGPT(self.layers, self.width, self.length)
            return _Logits(self._gpt2())
        import timm

        if self.name == "vit":
            return timm.create_model("vit_base_patch16_224", img_size=self.pixels)
        if self.name == "resnet50":
            return timm.create_model("resnet50_gn")
        return timm.create_model("resnet152", norm_layer="groupnorm")

    def dataloader(self) -> DataLoader[Any]:
        """Return a loader of logical batches, for an epoch of 100."""
        return DataLoader(Repeated(self._pool(), 100 * self.batch_size), batch_size=self.batch_size, shuffle=True)

    def _gpt2(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        heads = max(1, self.width // _HEAD_WIDTH)
        shape = {"n_layer": self.layers, "n_embd": self.width, "n_head": heads, "n_positions": self.length}
        return GPT2LMHeadModel(GPT2Config(**shape, vocab_size=VOCABULARY, use_cache=False, **still))

    def _pool(self) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(0)
        if self.name == "gpt2":
            ids = torch.randint(VOCABULARY, (_POOL, self.length + 1), generator=g)
            return [(row[:-1], row[1:]) for row in ids]
        labels = torch.randint(CLASSES, (_POOL,), generator=g)
        return [(torch.randn(3, self.pixels, self.pixels, generator=g), label) for label in labels]


class Repeated(Dataset[Any]):
    """A few examples, again and again."""

    def __init__(self, pool: list[tuple[Tensor, Tensor]], size: int) -> None:
        self.pool, self.size = pool, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pool[index % len(self.pool)]


class Task(pl.LightningModule):
    """Cross entropy of tokens or of images, and AdamW."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())  # all sequences are as long: a mean of means

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every variant."""
    return torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-4)


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits


class LinearGPT(nn.Module):
    """GPT-2 of layers that Opacus knows: ``nn.Linear``, an untied head, positions with an axis of samples."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD_WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
