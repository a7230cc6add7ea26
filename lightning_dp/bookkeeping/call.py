"""One call of a torch function that a trained parameter enters, and what its name alone tells.

Owns: `Call` and the functions that are copies or transpositions. Does not own: what is done with a call (``recorder``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from lightning_dp.bookkeeping.book import Derived, Target
from lightning_dp.bookkeeping.layout import Key

_TRANSPOSITIONS = {"t", "T", "mT", "adjoint"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
_COPIES = {"clone", "contiguous", "to", "float", "double", "bfloat16", "type_as", "type"}


@dataclass(eq=False, slots=True)
class Call:
    """One call of a torch function, what its leaves are to the book, and how the recorder knows it."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    targets: list[Target | None]
    key: Key


def is_copy(call: Call) -> bool:
    """Whether a function returns its first argument, up to memory layout and dtype."""
    return call.name in _COPIES


def is_transposition(call: Call) -> bool:
    """Whether a function returns the transpose of its first argument, a matrix."""
    if call.leaves[0].dim() != 2:
        return False
    return call.name in _TRANSPOSITIONS or (call.name in _SWAPS and {d % 2 for d in call.leaves[1:]} == {0, 1})


def identity(target: Target) -> Hashable:
    """Return what tells a parameter or a derived tensor from others in an observation."""
    return target.identity if isinstance(target, Derived) else target
