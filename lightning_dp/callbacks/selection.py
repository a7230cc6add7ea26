"""Which parameters are trained when the biases alone are: the biases, and those that are named.

Owns: the choice by name, its share and its refusals. Does not own: from when on it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.patterns import matches


class Selection:
    """The biases of a module, and those parameters that a name or pattern fits.

    Args:
        unfreeze: The names and patterns.
    """

    def __init__(self, unfreeze: Sequence[str]) -> None:
        self.unfreeze = (unfreeze,) if isinstance(unfreeze, str) else tuple(unfreeze)

    def __contains__(self, name: str) -> bool:
        return is_bias(name) or self._names(name)

    def freeze_others(self, module: nn.Module) -> None:
        """Freeze all other parameters, and unfreeze these."""
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self)
            if name not in self:
                parameter.grad = None  # no optimizer is to step by it once more

    def share(self, module: nn.Module) -> str:
        """Say how many parameters these are, counted as in the paper: without a new head on either side."""
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        head = sum(size for name, size in sizes.items() if self._names(name))
        biases = sum(size for name, size in sizes.items() if is_bias(name) and not self._names(name))
        total = sum(sizes.values()) - head
        besides = f", besides {head:,} of {', '.join(self.unfreeze)}" if head else ""
        return f"{biases:,} of {total:,} parameters are trained ({biases / max(1, total):.3%}){besides}"

    def check(self, module: nn.Module) -> None:
        """Raise if there is nothing to choose.

        Raises:
            PrivacyConfigurationError: If the module has no bias, or a name fits nothing.
        """
        names = list(dict(module.named_parameters()))
        if not any(map(is_bias, names)):
            raise PrivacyConfigurationError(
                f"BiasOnlyFinetuning: none of the {len(names)} parameters is a bias, by a name that ends in 'bias'. "
                "Give the layers biases (add_missing=True adds them), or train other parameters."
            )
        for pattern in self.unfreeze:
            if not any(matches(name, pattern) for name in names):
                raise PrivacyConfigurationError(
                    f"BiasOnlyFinetuning(unfreeze={list(self.unfreeze)}): {pattern!r} fits no parameter; there are "
                    f"{', '.join(names[:5])}, ..."
                )

    def check_others_are_trained(self, module: nn.Module) -> None:
        """Raise if nothing would change by freezing the other parameters.

        Raises:
            PrivacyConfigurationError: If all of them are frozen.
        """
        others = [parameter for name, parameter in module.named_parameters() if name not in self]
        if not any(parameter.requires_grad for parameter in others):
            raise PrivacyConfigurationError(
                f"BiasOnlyFinetuning(after_epoch=...): none of the {len(others)} parameters that are frozen after that "
                "epoch requires a gradient before. Unfreeze them (requires_grad_(True)), also after another fit that "
                "has frozen them, or use after_epoch=0."
            )

    def _names(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.unfreeze)


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias by its name: ``bias``, ``in_proj_bias``, ``bias_ih_l0``."""
    last = name.rpartition(".")[2]
    return last.endswith("bias") or last.startswith("bias_")
