"""A classifier of sentences: a pre-trained encoder, the mean of its tokens, and a head that starts at zero.

Owns: the network, and which of its parameters are there to be trained. Does not own: data, weights (``encoder``), the
training of biases (`lightning_dp.BiasOnlyFinetuning`), or anything private.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.demos.encoder import load_encoder

# The encoder is in evaluation mode on purpose: noise takes the place of dropout.
warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training")

Batch = tuple[Tensor, Tensor, Tensor]


class SentenceClassifier(pl.LightningModule):
    """Trained by Adam, with a learning rate that falls linearly to zero.

    Args:
        lr: Learning rate at the start.
        trained: ``"all"`` parameters, those of the ``"head"``, or the head and ``"lora"`` adapters of rank 8 on queries
            and values (needs peft).
        num_classes: How many classes there are.
        encoder: Folder of an encoder. Default: see `lightning_dp.demos.encoder`.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        trained: Literal["all", "head", "lora"] = "all",
        num_classes: int = 2,
        encoder: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.encoder = load_encoder(encoder)
        self.head = nn.Linear(self.encoder.config.hidden_size, num_classes)
        nn.init.zeros_(self.head.weight)  # a head that starts at zero wastes no private step on unlearning
        nn.init.zeros_(self.head.bias)
        if trained != "all":
            self.encoder.requires_grad_(False)
        if trained == "lora":
            self.encoder = _with_adapters(self.encoder)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, C]`` of tokens ``[B, T]``; padding, where ``mask`` is 0, takes no part."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(mean)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        tokens, mask, labels = batch
        return F.cross_entropy(self(tokens, mask), labels)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on held-out sentences."""
        tokens, mask, labels = batch
        self.accuracy(self(tokens, mask), labels)
        self.log("test accuracy", self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Adam; the planned number of steps is known as in any fit."""
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _with_adapters(encoder: Any) -> Any:
    """Return the encoder with LoRA adapters, which are all of it that is trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
