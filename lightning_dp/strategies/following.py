"""Following what is computed from the training samples, operator by operator.

Comparing the gradients of a few samples does not show everything: a loss may begin with the weight zero, a label may be
rare, a layer may begin with zeros. Whether a sample took part in a computation at all does not depend on its values.

Owns: which tensors depend on samples. Does not own: what follows from it (``trials``, ``manual``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_iter

from lightning_dp.bookkeeping.operators import written_by

_ONLY_SHAPE = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
"""Operators that take only shape, type and device from a tensor."""

_RUNNING = ("running_mean", "running_var")
"""Arguments that operators write to without saying so."""


class Following(TorchDispatchMode):
    """Notes every tensor that is computed from samples, in forward and backward passes, as long as it lives.

    Guarantee: what `depends` denies was computed by torch's operators from other things than the contents of samples.
    The shape of samples counts as none of it, nor do numbers that were read out of tensors (``item()``, ``numpy()``).
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the number from being used again
        self._is_paused = self._is_taken_off = False

    def mark(self, samples: Any) -> None:
        """Follow what will be computed from these samples: any nest of containers and objects."""
        self._storages = {number: weak for number, weak in self._storages.items() if not weak.expired()}
        for t in _tensors(samples, set()):
            self._note(t)

    def depends(self, t: Tensor) -> bool:
        """Whether a tensor was computed from samples."""
        return t.layout != torch.strided or t.untyped_storage()._cdata in self._storages

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing inside: what is released there may be known. As fast as without, unless a mode lies above."""
        is_top = _get_current_dispatch_mode() is self
        before, self._is_paused, self._is_taken_off = (self._is_paused, self._is_taken_off), True, is_top
        try:
            with _pop_mode_temporarily() if is_top else nullcontext():
                yield
        finally:
            self._is_paused, self._is_taken_off = before

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Follow again, inside `paused`."""
        before, self._is_paused = self._is_paused, False
        try:
            with self if self._is_taken_off else nullcontext():
                yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__ if isinstance(func, OpOverload) else ""  # "": it takes a function
        if self._is_paused or not self._storages or name in _ONLY_SHAPE:
            return result
        if any(isinstance(t, Tensor) and self.depends(t) for t in tree_iter((args, kwargs))):
            written = list(written_by(func, args, kwargs, _RUNNING)) if isinstance(func, OpOverload) else []
            self._note_all(tree_iter((result, written)))
        return result

    def _note_all(self, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._note(leaf)

    def _note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers and objects of any kind."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, str | bytes | int | float | type):
        return
    seen.add(id(value))
    parts: list[Any] = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, Sequence | Set):
        parts += value
    parts += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    for part in parts:
        yield from _tensors(part, seen)
