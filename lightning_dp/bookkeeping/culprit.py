"""Where samples meet: the line of the user's code at which a sample first changes what is computed for another.

Owns: the search, made only to tell the user once the self-check has failed. Does not own: the verdict (``self_check``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten

from lightning_dp.bookkeeping.axes import SampleAxis, find_axis
from lightning_dp.bookkeeping.contents import Digest, changed, digest, orders_of
from lightning_dp.bookkeeping.operators import OperatorMode
from lightning_dp.bookkeeping.source import calling_line

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Operator:
    """One operator of a forward pass: its name, the line that called it, and its outputs."""

    name: str
    line: str
    shapes: list[Shape]
    axes: list[SampleAxis | None] | None
    digests: list[Digest | None]


class _Watch(OperatorMode):
    """Notes every operator of a forward pass.

    Args:
        two: The operators of a pass with two samples; nothing in that pass itself.
    """

    def __init__(self, two: list[_Operator] | None = None) -> None:
        super().__init__()
        self.operators: list[_Operator] = []
        self._two = two or []

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            tensors = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
            self.operators.append(self._noted(func.overloadpacket.__name__, tensors))
        return result

    def _noted(self, name: str, tensors: list[Tensor]) -> _Operator:
        shapes, axes, at = [tuple(t.shape) for t in tensors], None, len(self.operators)
        if at < len(self._two) and self._two[at].name == name and len(self._two[at].shapes) == len(shapes):
            axes = _axes(self._two[at].shapes, shapes)
        digests = [digest(t, axis) for t, axis in zip(tensors, axes, strict=True)] if axes is not None else []
        return _Operator(name, calling_line(), shapes, axes, digests)


def where_samples_meet(batch_of: Callable[[str], Any], run: Callable[[Any], object]) -> str:
    """Return the operator and the line at which samples first influence each other, for a message; or nothing.

    Args:
        batch_of: Returns a batch of the samples named by a string: ``"aab"`` is ``[a, a, b]``.
        run: Runs the training step on a batch.
    """
    try:
        return _search(batch_of, run)
    except Exception:  # a hint that cannot be given must not hide the error that it belongs to
        return ""


def _search(batch_of: Callable[[str], Any], run: Callable[[Any], object]) -> str:
    watches: list[_Watch] = []
    for samples in ("ab", "aab", "bab"):
        batch = batch_of(samples)
        with _Watch(watches[0].operators if watches else None) as watch:
            run(batch)
        watches.append(watch)
    _, one, other = (watch.operators for watch in watches)
    reduced = ""
    for mine, its in zip(one, other, strict=False):
        if mine.axes is None or mine.name != its.name or mine.shapes != its.shapes or its.axes is None:
            return _said(mine)
        rows = zip(mine.axes, mine.digests, its.digests, strict=True)
        coupled = [axis for axis, x, y in rows if not orders_of(axis, changed(x, y), x)]
        if any(axis is not None for axis in coupled):
            return _said(mine)
        if coupled:
            reduced = reduced or _said(mine)
    return reduced


def _axes(two: list[Shape], three: list[Shape]) -> list[SampleAxis | None] | None:
    try:
        return [find_axis(a, b) for a, b in zip(two, three, strict=True)]
    except ValueError:
        return None


def _said(operator: _Operator) -> str:
    return f", first at {operator.line} ({operator.name})"
