"""A classifier of images: a network of timm with a new head that starts at zero.

Owns: the network, how images come into it, and the error if its weights cannot be had. Does not own: data, the training
of biases (`lightning_dp.BiasOnlyFinetuning`), or anything private.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class HubNetwork(nn.Module):
    """A network of timm, on images in [0, 1] of any size: scaled and normalised as it was trained.

    Args:
        name: As timm knows it, such as ``vit_base_patch16_224.augreg_in21k``.
        num_classes: Of a new head; 0 for none, which gives pooled features.
        pretrained: Whether it has the weights of the hub, or random ones.

    Raises:
        RuntimeError: If the weights cannot be had; it names the command that fetches them.
    """

    def __init__(self, name: str, num_classes: int = 0, pretrained: bool = True) -> None:
        super().__init__()
        import timm

        try:
            network: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
        except Exception as error:  # of the hub, of its HTTP library or of timm: all of them end here
            raise RuntimeError(
                f"no weights of backbone={name!r}: {error}\nWhere there is a network, run\n"
                f"  python -c \"import timm; timm.create_model('{name}', pretrained=True)\"\n"
                "and copy the folder ~/.cache/huggingface."
            ) from error
        asked = network.pretrained_cfg
        self.network, self.num_features, self.size = network, int(network.num_features), asked["input_size"][1:]
        self.mean, self.std = (nn.Buffer(torch.tensor(asked[name]).view(3, 1, 1)) for name in ("mean", "std"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` or features ``[B, d]`` of images ``[B, 1 or 3, H, W]``."""
        large = F.interpolate(images, self.size, mode="bicubic").expand(-1, 3, -1, -1)
        result: Tensor = self.network((large - self.mean) / self.std)
        return result


class ImageClassifier(pl.LightningModule):
    """Trained by Adam, with a learning rate that falls linearly to zero.

    Args:
        backbone: A network of timm. It must have no batch normalisation.
        lr: Learning rate at the start.
        num_classes: How many classes there are.
        pretrained: Whether it has the weights of the hub, or random ones.
    """

    def __init__(self, backbone: str, lr: float = 5e-3, num_classes: int = 10, pretrained: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.backbone = HubNetwork(backbone, num_classes, pretrained)
        for parameter in self.backbone.network.get_classifier().parameters():
            nn.init.zeros_(parameter)  # a head that starts at zero wastes no private step on unlearning
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of images ``[B, 3, H, W]`` in [0, 1]."""
        logits: Tensor = self.backbone(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on held-out images."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test accuracy", self.accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Adam; the planned number of steps is known as in any fit."""
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
