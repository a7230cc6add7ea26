"""The same random numbers for every sample, so that a gradient can be compared between batches of different sizes.

A batch of three draws other numbers than a batch of two, so a loss with noise in it (a variational autoencoder, a
diffusion model) differs between them without any fault. Where a sample is left out, all samples get equal draws.

Owns: the passes with equal draws. Does not own: what is compared (``self_check``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_dp.bookkeeping.axes import find_axis
from lightning_dp.bookkeeping.operators import OperatorMode

Shapes = list[tuple[int, ...] | None]
"""The shapes of what a random operator takes and returns; ``None`` for anything without a shape."""

_MANY = 2**32
"""More than a pass draws: the seed of what comes after a draw, whatever the draw's size."""


class Draws(OperatorMode):
    """Sees whether anything is drawn, and changes nothing."""

    seen = False

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator."""
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **kwargs)


class EqualDraws(OperatorMode):
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
        self._numbers: dict[Hashable, int] = {}
        self._axes = [_axes(*pair) for pair in zip(two or [], three or [], strict=False)]

    def operator(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw the same for every sample."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs), is_leaf=_is_size)
        # What is replayed, by a checkpoint or a rule, begins where it began before: it must draw the same once more.
        begins = func, torch.get_rng_state().numpy().tobytes(), *map(_count, leaves)
        number = self._numbers.setdefault(begins, len(self.drawn))
        try:
            return self._draw(number, func, leaves, spec)
        finally:
            torch.manual_seed(_MANY + number)

    def _draw(self, number: int, func: Any, leaves: list[Any], spec: TreeSpec) -> Any:
        """Draw what has this number in the pass."""
        seed = _seeding(number, leaves)
        seed()
        args, kwargs = tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        outputs, structure = tree_flatten(result)
        shapes = [_shape(leaf) for leaf in (*leaves, *outputs)]
        if number == len(self.drawn):
            self.drawn.append(shapes)
        axes = self._axes[number] if number < len(self._axes) else []
        if len(axes) != len(shapes) or all(axis is None for axis in axes):
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


def _count(leaf: Any) -> int | None:
    """Return how many numbers a tensor or a size asks for; one sample alone may come without its axis."""
    shape = _shape(leaf)
    return None if shape is None else math.prod(shape)


def _is_along(leaf: Any, axis: int | None) -> bool:
    return isinstance(leaf, Tensor) and axis is not None


def _row(leaf: Any, axis: int | None, row: int) -> Any:
    """Return one row of a tensor, or the size of one row."""
    if axis is None:
        return leaf
    return leaf.narrow(axis, row, 1) if isinstance(leaf, Tensor) else [*leaf[:axis], 1, *leaf[axis + 1 :]]
