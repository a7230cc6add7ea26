"""Fine-tuning on real data without a download: digits scanned well are public, digits under a shadow are private.

Owns: the public and the private part of scikit-learn's digits, and a network that was trained on the public part.
Does not own: which of its parameters are trained privately.

The shadow is ours, darker from left to right, as on a page near the fold of a book. It was chosen, among some other
changes of the images, because it suits the training of biases: it is a background, which a bias of the first layer can
take off. A change of shape does not: on slanted digits full fine-tuning of such a small network is far ahead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.demos.digits import Digits, DigitsClassifier, DigitsDataModule

NUM_PUBLIC = 400


def shade(x: Tensor, depth: float = 0.7) -> Tensor:
    """Darken images ``[N, 64]``, 0 for paper and 1 for ink: by 0 on the left to ``depth`` on the right, up to 1."""
    return (x + torch.linspace(0, depth, 8).repeat(8)).clamp(max=1)


def public_digits() -> Digits:
    """Return the first 400 of the training images as they are; they are in no private part."""
    data = DigitsDataModule()
    data.setup("fit")
    x, y = data.train[:NUM_PUBLIC]
    return Digits(x, y)


class ShadedDigitsDataModule(DigitsDataModule):
    """The other 1,037 training images and the 360 held-out ones, all under a shadow.

    Args:
        batch_size: Expected size of a logical batch.
    """

    def __init__(self, batch_size: int = 260) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str) -> None:
        """Split, always the same way."""
        super().setup(stage)
        (x, y), (x_test, y_test) = self.train[NUM_PUBLIC:], self.held_out[:]
        self.train, self.held_out = Digits(shade(x), y), Digits(shade(x_test), y_test)


class PretrainedDigitsClassifier(DigitsClassifier):
    """The network of `DigitsClassifier`, on the pixels as they are, trained on the public digits when it is made.

    Args:
        hidden: Width of the hidden layer.
        lr: Learning rate at the start of fine-tuning.
        pretraining_steps: Steps of Adam on all public images, without privacy.
    """

    def __init__(self, hidden: int = 128, lr: float = 1.0, pretraining_steps: int = 150) -> None:
        super().__init__(hidden, lr)
        self._pretrain(pretraining_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 64]``."""
        logits: Tensor = self.net(2 * x - 1)
        return logits

    def _pretrain(self, steps: int) -> None:
        x, y = public_digits()[:]
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
