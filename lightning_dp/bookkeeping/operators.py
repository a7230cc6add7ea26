"""Seeing every operator that a pass runs, whether a parameter enters it or not.

Owns: the common part of all who look on, and which arguments an operator writes to. Does not own: what they look for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """Gives every operator on tensors to `operator`; those that take functions for arguments run as they are."""

    supports_higher_order_operators = True  # else FlexAttention would not run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload):
            return func(*args, **(kwargs or {}))
        return self.operator(func, args, kwargs or {})

    @abstractmethod
    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator, and return what it returns."""


def written_by(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], also: Sequence[str] = ()
) -> Iterator[Any]:
    """Yield the arguments that an operator writes to: those that it declares, and those of these names."""
    for k, argument in enumerate(func._schema.arguments):
        if argument.name in also or (argument.alias_info is not None and argument.alias_info.is_write):
            yield args[k] if k < len(args) else kwargs.get(argument.name)
