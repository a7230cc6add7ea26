"""CIFAR-10: 50,000 images of 32 by 32 pixels to train on, 10,000 to test on (Krizhevsky 2009).

Owns: the images. Does not own: the network (``images``).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10 as Files


class CIFAR10(pl.LightningDataModule):
    """Images ``[3, 32, 32]`` in [0, 1], without augmentation, and labels.

    Args:
        batch_size: Expected size of a logical batch.
        folder: Where torchvision keeps the files; they are downloaded if they are not there.
    """

    def __init__(self, batch_size: int = 1000, folder: str = "data") -> None:
        super().__init__()
        self.batch_size, self.folder = batch_size, folder

    def prepare_data(self) -> None:
        """Download the files, if need be."""
        Files(self.folder, download=True)

    def setup(self, stage: str) -> None:
        """Read the files."""
        self.train, self.test = (_tensors(Files(self.folder, train=train)) for train in (True, False))

    def train_dataloader(self) -> DataLoader[Any]:
        """Images to train on."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """All held-out images."""
        return DataLoader(self.test, batch_size=256)


class Images(TensorDataset):
    """Images ``[N, 3, H, W]`` of bytes, given out in [0, 1], and labels ``[N]``."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return an image ``[3, H, W]`` and its label."""
        image, label = super().__getitem__(index)
        return image.float() / 255, label


def _tensors(files: Any) -> Images:
    return Images(torch.from_numpy(files.data).permute(0, 3, 1, 2), torch.tensor(files.targets))
