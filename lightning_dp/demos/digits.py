"""UCI handwritten digits as scikit-learn ships them: 1,437 images of 8x8 pixels to train on, 360 to test."""

from __future__ import annotations

import warnings
from typing import Any

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


class Digits(TensorDataset):
    """Images ``[N, 64]`` in [0, 1] and labels ``[N]``."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y))


class DigitsDataModule(pl.LightningDataModule):
    """The digits; one fifth is held out.

    Args:
        batch_size: Expected size of a logical batch.
        public_share: The share of the training examples that count as public, for `PublicPretraining`.
        public_batch_size: Size of a public batch.
    """

    def __init__(self, batch_size: int = 719, public_share: float = 0.0, public_batch_size: int = 72) -> None:
        super().__init__()
        self.batch_size, self.public_share, self.public_batch_size = batch_size, public_share, public_batch_size

    def setup(self, stage: str) -> None:
        """Split, always the same way."""
        digits = load_digits()
        parts = train_test_split(digits.data / 16, digits.target, test_size=360, random_state=0, stratify=digits.target)
        x_train, x_test, y_train, y_test = parts
        self.held_out = Digits(x_test, y_test)
        count = round(self.public_share * len(y_train))
        if count:
            parts = train_test_split(x_train, y_train, test_size=count, random_state=0, stratify=y_train)
            x_train, x_public, y_train, y_public = parts
            self.public = Digits(x_public, y_public)
        self.train = Digits(x_train, y_train)

    def train_dataloader(self) -> DataLoader[Any]:
        """Examples to train on."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def public_dataloader(self) -> DataLoader[Any] | None:
        """Examples that may be known to everybody; none unless there is a ``public_share``."""
        return DataLoader(self.public, batch_size=self.public_batch_size, shuffle=True) if self.public_share else None

    def test_dataloader(self) -> DataLoader[Any]:
        """All held-out examples, in one batch."""
        return DataLoader(self.held_out, batch_size=len(self.held_out))


class DigitsClassifier(pl.LightningModule):
    """A network with one hidden layer, trained by SGD with a learning rate that falls linearly to zero.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate at the start.
    """

    def __init__(self, hidden: int = 128, lr: float = 3.6) -> None:
        super().__init__()
        self.save_hyperparameters()
        head = nn.Linear(hidden, 10)
        nn.init.zeros_(head.weight)  # a head that starts at zero wastes no private step on unlearning
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), head)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 64]``."""
        x = x - x.mean(1, keepdim=True)
        logits: Tensor = self.net(6 * F.normalize(x))  # each image by its own mean and length: no shared statistics
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

    def configure_optimizers(self) -> Any:
        """Plain SGD; the planned number of steps is known as in any fit."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
