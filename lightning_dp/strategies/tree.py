"""What the user's module consists of, without walking over it in every step.

Owns: the walk, and whether it would find something else now. Does not own: what is checked or put back (``checks``,
``undisturbed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric


class Tree:
    """The modules and parameters of a module: a walk that is done again only if it would find others.

    To know that, `look` asks every module that was found what it holds now: that is all that a walk goes by.

    Args:
        root: The user's module.

    Attributes:
        modules: All modules, each once.
        parameters: All parameters, each once.
        metrics: The modules that are metrics.
        others: Those that are not.
        held: Tells this tree from another: what the modules are, with names and objects of what they hold.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    metrics: list[Metric]
    others: list[nn.Module]
    held: list[Any]

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._walk()

    def look(self) -> None:
        """Walk again if the modules hold something else than they did."""
        if not same(self.held, _held(self.modules)):
            self._walk()

    def buffers(self) -> list[Tensor]:
        """Return all buffers."""
        return [b for m in self.modules if m._buffers for b in m._buffers.values() if b is not None]

    def _walk(self) -> None:
        self.modules, self.parameters = list(self._root.modules()), list(self._root.parameters())
        self.metrics = [m for m in self.modules if isinstance(m, Metric)]
        self.others = [m for m in self.modules if not isinstance(m, Metric)]
        self.held = _held(self.modules)


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


def _held(modules: list[nn.Module]) -> list[Any]:
    """Return what modules are, and names and objects of what they hold, behind the module that holds them."""
    found: list[Any] = list(map(type, modules))
    every: list[dict[str, Any]] = [m._modules for m in modules] + [m._parameters for m in modules]
    for m, held in zip(modules + modules, every, strict=True):
        if held:
            found += (m, *held, *held.values())
    return found
