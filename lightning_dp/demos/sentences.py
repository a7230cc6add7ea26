"""A classifier of sentences: a pre-trained encoder, the mean of its tokens, and a head that starts at zero.

Owns: the network, which of its parameters are there to be trained, and the head alone on means that are known already.
Does not own: data, weights (``encoder``), the training of biases (`lightning_dp.BiasOnlyFinetuning`), or anything
private.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.demos.encoder import load_encoder
from lightning_dp.demos.sentence_data import Example, collate

# The encoder is in evaluation mode on purpose: noise takes the place of dropout.
warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training")


class _Classifier(pl.LightningModule):
    """Maps all of a batch but the labels, its last part, to logits."""

    def __init__(self, lr: float, head_lr: float | None, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.lr, self.head_lr = lr, lr if head_lr is None else head_lr
        self.head = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.head.weight)  # a head that starts at zero wastes no private step on unlearning
        nn.init.zeros_(self.head.bias)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        *inputs, labels = batch
        return F.cross_entropy(self(*inputs), labels)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Accuracy on held-out sentences."""
        *inputs, labels = batch
        self.accuracy(self(*inputs), labels)
        self.log("test accuracy", self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Adam; the planned number of steps is known as in any fit."""
        head = list(self.head.parameters())
        own = {id(p) for p in head}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        groups = [{"params": head, "lr": self.head_lr}, *([{"params": others, "lr": self.lr}] if others else [])]
        optimizer = torch.optim.Adam(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SentenceClassifier(_Classifier):
    """Trained by Adam, with learning rates that fall linearly to zero.

    Args:
        lr: Learning rate at the start.
        head_lr: That of the head. Default: the same.
        trained: ``"all"`` parameters, those of the ``"head"``, or the head and ``"lora"`` adapters of rank 8 on queries
            and values (needs peft).
        num_classes: How many classes there are.
        encoder: Folder of an encoder. Default: see `lightning_dp.demos.encoder`.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        head_lr: float | None = None,
        trained: Literal["all", "head", "lora"] = "all",
        num_classes: int = 2,
        encoder: str | None = None,
    ) -> None:
        loaded = load_encoder(encoder)
        super().__init__(lr, head_lr, loaded.config.hidden_size, num_classes)
        self.save_hyperparameters()
        self.encoder = loaded
        if trained != "all":
            self.encoder.requires_grad_(False)
        if trained == "lora":
            self.encoder = _with_adapters(self.encoder)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, C]`` of tokens ``[B, T]``; padding, where ``mask`` is 0, takes no part."""
        logits: Tensor = self.head(self.mean_state(tokens, mask))
        return logits

    def mean_state(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean ``[B, d]`` of the encoder's outputs for tokens ``[B, T]``."""
        states: Tensor = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


class SentenceHead(_Classifier):
    """The head of a `SentenceClassifier` alone, on means of the encoder's outputs; trained in the same way.

    Args:
        lr: Learning rate at the start.
        num_features: Size of such a mean.
        num_classes: How many classes there are.
    """

    def __init__(self, lr: float, num_features: int, num_classes: int = 2) -> None:
        super().__init__(lr, None, num_features, num_classes)

    def forward(self, means: Tensor) -> Tensor:
        """Logits ``[B, C]`` of means ``[B, d]``."""
        logits: Tensor = self.head(means)
        return logits


def known_means(model: SentenceClassifier, examples: Sequence[Example], batch_size: int = 64) -> TensorDataset:
    """Return what the encoder makes of sentences, ``[N, d]``, with their labels ``[N]``.

    Args:
        model: The encoder is its.
        examples: Sentences as tokens, with labels.
        batch_size: How many sentences the encoder sees at a time.
    """
    batches: DataLoader[Any] = DataLoader(examples, batch_size, collate_fn=collate)  # type: ignore[arg-type]
    with torch.inference_mode():
        rows = torch.cat([model.mean_state(tokens, mask) for tokens, mask, _ in batches])
    return TensorDataset(rows.clone(), torch.tensor([label for _, label in examples]))  # clone: to be trained on


def _with_adapters(encoder: Any) -> Any:
    """Return the encoder with LoRA adapters, which are all of it that is trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
