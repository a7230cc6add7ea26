"""One use of a trainable parameter by one torch function, as a rule sees it.

Owns: the questions a rule may ask. Does not own: the rules themselves (``rules``) or the dispatch (``recorder``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_dp.bookkeeping.axes import SampleAxis, Split
from lightning_dp.bookkeeping.book import Book, Target
from lightning_dp.bookkeeping.entries import Entry
from lightning_dp.bookkeeping.layout import Layout
from lightning_dp.bookkeeping.random_state import RandomState

File = Callable[[Entry], None]

Recording = tuple[Callable[..., None], list[Tensor]]
"""What a rule returns: ``record(*output_gradients, *saved)`` for the backward pass, and the tensors to save for it.

``record`` must hold no tensor of the forward pass itself: what is saved may be dropped and recomputed."""

Rule = Callable[..., Recording | None]
"""``rule(operation, *args, **kwargs)`` with the arguments of the torch function; ``None`` where it does not apply."""


@dataclass(eq=False, slots=True)
class Operation:
    """One call of a function; not frozen, as there is one for every call, and frozen ones take long to make.

    Args:
        func: The function.
        args: Its positional arguments, swapped parameters and derived tensors included.
        kwargs: Its keyword arguments.
        leaves: The leaves of both, in the order of ``layout.leaves``.
        layout: Where the samples lie.
        book: Where entries go.
        targets: Of the leaves, in their order: ``None`` for what is not trained.
        plain: Returns the argument as an ordinary detached tensor, anything else unchanged.
        random_state: The state of the random number generators before the call, if the function draws from them.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    layout: Layout
    book: Book
    targets: list[Target | None]
    plain: Callable[[Any], Any]
    random_state: RandomState | None = None

    def filing(self, argument: Any) -> File | None:
        """Return a function that files an entry of this argument, or ``None`` if the argument is not trained."""
        for leaf, target in zip(self.leaves, self.targets, strict=True):
            if leaf is argument and target is not None:
                return partial(self.book.file, target)
        return None

    def axis(self, argument: Tensor) -> SampleAxis | None:
        """Return the sample axis of an argument."""
        for leaf, axis in zip(self.leaves, self.layout.leaves, strict=False):
            if leaf is argument:
                return axis
        raise AssertionError("a rule asks for an argument of its function")

    def split_output(self, at: int = 0) -> Split:
        """Return the split of an output (and of its gradient) into samples."""
        axis, num_samples = self.layout.outputs[at], self.book.num_samples
        assert axis is not None, "a rule is only asked where the output carries samples"
        return lambda t: axis.split(t, num_samples)

    def positions(self, axis: SampleAxis, feature_dims: int) -> Split:
        """Return what makes ``[B, T, *features]`` of a tensor with this sample axis."""
        num_samples = self.book.num_samples
        return lambda t: axis.positions(t, num_samples, feature_dims)
