"""Parameters that a training step writes itself: averages of weights, weights clipped to a range.

Owns: noticing and undoing such writes while a training step is tried. Does not own: whether they are allowed
(``bookkeeping.self_check``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter

from lightning_dp.bookkeeping.held import held
from lightning_dp.bookkeeping.operators import OperatorMode, written_by


class Written(OperatorMode):
    """Undoes every write into a parameter; copies a parameter only when it is about to be written.

    Args:
        parameters: The parameters by name.

    Attributes:
        names: The parameters that were written.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._parameters = {name: held(p) for name, p in parameters.items() if not is_lazy(p)}
        self._data = {name: p.data for name, p in self._parameters.items()}
        self._copies: dict[str, Tensor] = {}
        self._at: dict[int, list[str]] = {}  # several lie in one memory: flattened weights of recurrent layers
        for name, p in self._parameters.items():
            if p.numel():
                self._at.setdefault(_address(p), []).append(name)

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copy what an operator is about to write."""
        if func._schema.is_mutable:
            for t in tree_iter(list(written_by(func, args, kwargs))):
                for name in self._at.get(_address(t), ()) if isinstance(t, Tensor) else ():
                    if name not in self._copies:
                        self._copies[name] = self._data[name].clone()
        return func(*args, **kwargs)

    def undo(self) -> None:
        """Give the parameters back what they held."""
        for name, p in self._parameters.items():
            if _place(p) != _place(self._data[name]):  # ``p.data = ...``
                p.data = self._data[name]
                self.names.add(name)
        with torch.no_grad():
            for name, copy in self._copies.items():
                self._data[name].copy_(copy)
        self.names |= self._copies.keys()
        self._copies.clear()


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _address(t: Tensor) -> int:
    return held(t).untyped_storage().data_ptr()
