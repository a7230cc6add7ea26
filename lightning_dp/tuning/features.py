"""Features of a frozen encoder, and the linear head on them: what linear scaling is made for.

Owns: the rescaling, full batches and the head. Does not own: the search (``search``); the head trains by any strategy.

arXiv 2212.04486, section 3.1: the encoder is public; every feature vector is brought to one length, which looks at no
other example and so costs nothing; the head has no bias and begins at zero. With length 1 the gradient of one example,
``(softmax(W f) - y) f^T``, has a norm below ``sqrt(2)``, so that clipping to 1 changes little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.errors import PrivacyConfigurationError

Example = tuple[Tensor, Tensor]


class FrozenFeatures(Dataset[Example]):
    """Features of a frozen encoder, computed once, each rescaled to the same L2 norm.

    Guarantee: the features of an example depend on that example and the encoder alone.

    | features of an example | become |
    |---|---|
    | zero, or not all finite | zero |
    | any others | multiplied to have the norm |

    Args:
        encoder: Maps inputs ``[B, ...]`` to features ``[B, ...]``, which are flattened to ``[B, d]``; it must come from
            public data. It is run in evaluation mode, without gradients, and left as it was.
        dataset: Pairs of an input and a label.
        norm: The L2 norm (not squared) of every feature vector.
        batch_size: How many examples the encoder sees at a time.
        device: Where the encoder runs, such as ``"cuda"``; it is left there.

    Raises:
        PrivacyConfigurationError: If ``norm`` is not above 0, or the features of an example change with the others of
            its batch.
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        dataset: Dataset[Any],
        *,
        norm: float = 1.0,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 < norm < float("inf"):
            raise PrivacyConfigurationError(
                f"norm={norm!r}: expected a finite number > 0, the L2 norm of all features."
            )
        features, labels = _encoded(encoder, dataset, batch_size, torch.device(device))
        self.features, self.labels = rescaled(features, norm), labels

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Return the features ``[d]`` and the label of one example."""
        return self.features[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Rows:
        """Return several examples at once."""
        return Rows(self.features[indices], self.labels[indices])

    def dataloader(self) -> DataLoader[Example]:
        """Return a dataloader of full batches: with `DPStrategy` every step is on all examples, ``sample_rate`` 1."""
        return DataLoader(self, batch_size=len(self), collate_fn=collate_rows)


class Rows(Sequence[Example]):
    """Examples as a list would have them, without taking the tensors apart.

    Args:
        features: ``[B, d]``.
        labels: ``[B]``.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Return one example."""
        return self.features[index], self.labels[index]


def collate_rows(examples: Sequence[Example]) -> Any:
    """Return a batch: features ``[B, d]`` and labels ``[B]``."""
    return (examples.features, examples.labels) if isinstance(examples, Rows) else default_collate(list(examples))


class LinearHead(pl.LightningModule):
    """A linear classifier without bias that begins at zero, trained by SGD with momentum and no decay.

    Validation logs ``val_accuracy``, a test ``test_accuracy``.

    Args:
        num_features: d.
        num_classes: Number of labels.
        lr: Learning rate.
        momentum: Of SGD.
    """

    def __init__(self, num_features: int, num_classes: int, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.head = nn.Linear(num_features, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.lr, self.momentum = lr, momentum

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of features ``[B, d]``."""
        logits: Tensor = self.head(features)
        return logits

    def training_step(self, batch: Example, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        features, labels = batch
        return F.cross_entropy(self(features), labels)

    def validation_step(self, batch: Example, batch_idx: int) -> None:
        """Accuracy."""
        features, labels = batch
        self.val_accuracy(self(features), labels)
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch: Example, batch_idx: int) -> None:
        """Accuracy."""
        features, labels = batch
        self.test_accuracy(self(features), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with a constant learning rate."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def rescaled(features: Tensor, norm: float) -> Tensor:
    """Return features ``[N, d]`` with rows of this L2 norm; rows that are zero or not finite are zero."""
    kept = features.isfinite().all(1, keepdim=True)
    # By the largest entry first: the square of a large one is infinite.
    bounded = torch.where(kept, features, 0)
    bounded = bounded / bounded.abs().amax(1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
    lengths = bounded.norm(dim=1, keepdim=True)
    return norm * bounded / torch.where(lengths > 0, lengths, 1)


def _encoded(encoder: Any, dataset: Dataset[Any], batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features ``[N, d]`` and labels ``[N]``, on the CPU."""
    module = encoder if isinstance(encoder, nn.Module) else None
    modes = [(part, part.training) for part in module.modules()] if module is not None else []
    if module is not None:
        module.to(device).eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        with torch.no_grad():
            for inputs, targets in DataLoader(dataset, batch_size=batch_size):
                encoded = encoder(inputs.to(device)).flatten(1)
                if not features:
                    _check_independent(encoder, inputs.to(device), encoded)
                features.append(encoded.float().cpu())
                labels.append(targets)
    finally:
        for part, mode in modes:
            part.training = mode
    return torch.cat(features), torch.cat(labels)


def _check_independent(encoder: Any, inputs: Tensor, features: Tensor) -> None:
    """Raise if the first example's features are others when it is alone."""
    alone = encoder(inputs[:1]).flatten(1)
    if not torch.allclose(alone, features[:1], rtol=1e-2, atol=1e-3 * float(features[:1].abs().max()), equal_nan=True):
        raise PrivacyConfigurationError(
            f"the encoder ({type(encoder).__name__}) gives an example other features alone than beside others: what "
            "one example adds would not be bounded. Expected a function of each example, such as a network whose "
            "normalisation layers use stored statistics in evaluation mode."
        )
