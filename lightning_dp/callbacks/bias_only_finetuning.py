"""`BiasOnlyFinetuning`: DP-BiTFiT, training of the biases alone (arXiv 2210.00036)."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.patterns import matches


class BiasOnlyFinetuning(pl.Callback):
    """Freezes all parameters but the biases, and those that ``unfreeze`` names, before the optimizer is made.

    A bias needs no layer input for its gradient, so private training of biases costs what ordinary training of them
    costs. The optimizer should be made of the parameters that require a gradient, or of all: frozen ones are left
    alone.

    Args:
        unfreeze: Which parameters are trained as well, typically a new head: parts of dotted names (``"head"`` is
            ``head.weight`` and ``model.head.weight``) or patterns (``"*.norm*.weight"``).

    Raises:
        PrivacyConfigurationError: At the start of the fit, if there is no bias, or a name in ``unfreeze`` fits nothing.
    """

    def __init__(self, unfreeze: Sequence[str] = ()) -> None:
        super().__init__()
        self.unfreeze = (unfreeze,) if isinstance(unfreeze, str) else tuple(unfreeze)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze."""
        if stage != "fit":
            return
        named = dict(pl_module.named_parameters())
        self._check(named)
        for name, parameter in named.items():
            parameter.requires_grad_(is_bias(name) or any(matches(name, pattern) for pattern in self.unfreeze))
        trained = sum(p.numel() for p in named.values() if p.requires_grad)
        total = sum(p.numel() for p in named.values())
        rank_zero_info(f"Bias-only: {trained:,} of {total:,} parameters are trained ({trained / total:.3%}).")

    def _check(self, named: dict[str, nn.Parameter]) -> None:
        if not any(map(is_bias, named)):
            raise PrivacyConfigurationError(
                f"BiasOnlyFinetuning: none of the {len(named)} parameters is a bias, by a name that ends in 'bias'. "
                "Give the layers biases, or train other parameters."
            )
        for pattern in self.unfreeze:
            if not any(matches(name, pattern) for name in named):
                raise PrivacyConfigurationError(
                    f"BiasOnlyFinetuning(unfreeze={list(self.unfreeze)}): {pattern!r} fits no parameter; there are "
                    f"{', '.join(list(named)[:5])}, ..."
                )


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by its name: ``bias``, ``in_proj_bias``, ``bias_ih_l0``."""
    last = name.rpartition(".")[2]
    return last.endswith("bias") or last.startswith("bias_")
