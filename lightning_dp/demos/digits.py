"""UCI handwritten digits as scikit-learn ships them: 1,437 images of 8x8 pixels to train on, 360 to test."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

# Lightning advises worker processes for every DataLoader; a dataset in memory is slower with them.
warnings.filterwarnings("ignore", message=r".*does not have many workers")

Batch = tuple[Tensor, Tensor]


class DigitsDataModule(pl.LightningDataModule):
    """The digits, images ``[B, 64]`` in [0, 1] and labels ``[B]``; one fifth is held out.

    Args:
        batch_size: Expected size of a logical batch.
    """

    def __init__(self, batch_size: int = 360) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split, always the same way."""
        digits = load_digits()
        parts = train_test_split(digits.data / 16, digits.target, test_size=360, random_state=0, stratify=digits.target)
        x_train, x_test, y_train, y_test = parts
        self.train = TensorDataset(torch.tensor(x_train, dtype=torch.float32), torch.tensor(y_train))
        self.held_out = TensorDataset(torch.tensor(x_test, dtype=torch.float32), torch.tensor(y_test))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Examples to train on."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Batch]:
        """All held-out examples, in one batch."""
        return DataLoader(self.held_out, batch_size=len(self.held_out))


class DigitsClassifier(pl.LightningModule):
    """A network with one hidden layer, trained with plain SGD.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate.
    """

    def __init__(self, hidden: int = 64, lr: float = 2.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 64]``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on the held-out examples."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)
