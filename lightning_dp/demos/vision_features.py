"""Features of images by a frozen, public network: one from the hub, or one that public digits have trained.

Owns: the small network, and the digits' features. Does not own: networks of the hub (``images``), the rescaling of
features or the head on them (`lightning_dp.FrozenFeatures`, `lightning_dp.LinearHead`).

Public are the first 50 of scikit-learn's training digits, which train the small network; private are the other 1,387.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp.demos.digits import Digits, DigitsDataModule
from lightning_dp.demos.images import HubNetwork
from lightning_dp.tuning import FrozenFeatures

NUM_PUBLIC = 50
PIXELS = "pixels"
"""No network at all, to compare with."""


class SmallConvNet(nn.Module):
    """Two convolutions: features ``[B, 256]`` of images ``[B, 64]``; 8 by 8 pixels in [0, 1]."""

    num_features = 256

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, 256]``."""
        features: Tensor = self.layers(x.view(-1, 1, 8, 8))
        return features


def trained_on(public: Digits, steps: int = 60) -> SmallConvNet:
    """Return the small network after so many steps of Adam on all public images, each time shifted otherwise."""
    encoder, head = SmallConvNet(), nn.Linear(SmallConvNet.num_features, 10)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    x, y = public[:]
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(encoder(_shifted(x))), y).backward()
        optimizer.step()
    return encoder.requires_grad_(False).eval()


def network(backbone: str | None, public: Digits) -> nn.Module:
    """Return the network of a name: see `DigitFeatures`."""
    if backbone is None:
        return trained_on(public)
    return nn.Identity() if backbone == PIXELS else nn.Sequential(nn.Unflatten(1, (1, 8, 8)), HubNetwork(backbone))


class Centred(nn.Module):
    """A network whose features have mean zero over public images.

    Args:
        network: Gives features ``[B, d]`` of images.
        public: Images that may be known to everybody.
    """

    def __init__(self, network: nn.Module, public: Digits) -> None:
        super().__init__()
        self.network = network.eval()
        with torch.no_grad():
            self.register_buffer("mean", network(public[:][0]).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, d]``."""
        features: Tensor = self.network(x) - self.mean
        return features


class DigitFeatures(pl.LightningDataModule):
    """Features of the private digits, to train on, and of the held-out ones; computed once.

    Every training batch is all of the private digits. From all features the mean of the public ones is taken off: what
    features have in common says nothing about a class, and noise in its direction would be as large as elsewhere.

    Args:
        backbone: A network of timm, whose weights come from the hub, or ``"pixels"`` for none. Default: the small one,
            trained on public digits.
        device: Where the network runs.
    """

    def __init__(self, backbone: str | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.backbone, self.device = backbone, device
        self.train: FrozenFeatures | None = None

    def setup(self, stage: str) -> None:
        """Compute the features, once."""
        if self.train is not None:
            return
        digits = DigitsDataModule()
        digits.setup(stage)
        public, private = (Digits(*digits.train[part]) for part in (slice(NUM_PUBLIC), slice(NUM_PUBLIC, None)))
        encoder = Centred(network(self.backbone, public), public)
        self.public, self.train, self.held_out = (
            FrozenFeatures(encoder, part, device=self.device) for part in (public, private, digits.held_out)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Private features, all in one batch."""
        assert self.train is not None, "setup comes first"
        return self.train.dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Held-out features."""
        return self.held_out.dataloader()


def _shifted(x: Tensor) -> Tensor:
    """Images ``[N, 64]`` moved by at most one pixel each way, those of a batch alike."""
    by = torch.randint(-1, 2, (2,)).tolist()
    return x.view(-1, 8, 8).roll(by, (1, 2)).flatten(1)
