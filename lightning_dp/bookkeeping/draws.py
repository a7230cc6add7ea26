"""The same random numbers for every sample, so that a gradient can be compared between batches of different sizes.

A batch of three draws other numbers than a batch of two, so a loss with noise in it (a variational autoencoder, a
diffusion model) differs between them without any fault. Where a sample is left out, all samples get equal draws.

Owns: the passes with equal draws. Does not own: what is compared (``self_check``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dp.bookkeeping.axes import find_axis

Shapes = list[tuple[int, ...] | None]
"""The shapes of what a random operator takes and returns; ``None`` for anything without a shape."""


class EqualDraws(TorchDispatchMode):
    """Lets every random operator draw the same numbers for all samples.

    An axis that holds samples is found as everywhere: it grows from two samples to three. What torch does not draw, and
    operators whose sizes do not scale, are left as they are.

    Args:
        two: What a pass over two samples drew, in order; nothing in the passes that find it out.
        three: The same for three samples.
    """

    def __init__(self, two: list[Shapes] | None = None, three: list[Shapes] | None = None) -> None:
        super().__init__()
        self.drawn: list[Shapes] = []
        self._axes = [_axes(*pair) for pair in zip(two or [], three or [], strict=False)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        number = len(self.drawn)
        leaves, spec = tree_flatten((args, kwargs), is_leaf=_is_size)
        seed = _seeding(number, leaves)
        seed()
        result = func(*args, **kwargs)
        outputs, structure = tree_flatten(result)
        self.drawn.append([_shape(leaf) for leaf in (*leaves, *outputs)])
        axes = self._axes[number] if number < len(self._axes) else []
        if len(axes) != len(self.drawn[-1]) or all(axis is None for axis in axes):
            return result

        def drawn_for(row: int) -> list[Any]:
            seed()
            row_args, row_kwargs = tree_unflatten([_row(t, k, row) for t, k in zip(leaves, axes, strict=False)], spec)
            return tree_flatten(func(*row_args, **row_kwargs))[0]

        rows = next(t.shape[k] for t, k in zip((*leaves, *outputs), axes, strict=True) if _is_along(t, k))
        parts = zip(*map(drawn_for, range(rows)), strict=True)
        if any(out is leaf for out in outputs for leaf in leaves):  # in place: each row was a view of it
            return result
        output_axes = axes[len(leaves) :]
        joined = [part[0] if k is None else torch.cat(part, k) for part, k in zip(parts, output_axes, strict=True)]
        return tree_unflatten(joined, structure)


def _axes(two: Shapes, three: Shapes) -> list[int | None]:
    """Return for everything taken and returned the axis that holds samples; nothing at all if sizes do not scale."""
    try:
        found = [find_axis(a, b) if a is not None and b is not None else None for a, b in zip(two, three, strict=True)]
    except ValueError:
        return []
    return [axis.dim if axis is not None else None for axis in found]


def _seeding(number: int, leaves: list[Any]) -> Callable[[], None]:
    """Return what makes an operator draw the same again: from a generator of its own, or from the default one."""
    states = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]

    def seed() -> None:
        torch.manual_seed(number)
        for generator, state in states:
            generator.set_state(state)

    return seed


def _is_size(leaf: Any) -> bool:
    return isinstance(leaf, list | tuple) and len(leaf) > 0 and all(isinstance(n, int) for n in leaf)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    return tuple(leaf) if _is_size(leaf) else None


def _is_along(leaf: Any, axis: int | None) -> bool:
    return isinstance(leaf, Tensor) and axis is not None


def _row(leaf: Any, axis: int | None, row: int) -> Any:
    """Return one row of a tensor, or the size of one row."""
    if axis is None:
        return leaf
    return leaf.narrow(axis, row, 1) if isinstance(leaf, Tensor) else [*leaf[:axis], 1, *leaf[axis + 1 :]]
