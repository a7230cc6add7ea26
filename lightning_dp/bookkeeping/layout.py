"""What was observed of one function that a trainable parameter enters, and where such observations are kept.

Owns: `Layout` and `Layouts`. Does not own: the observing (``observation``) or the use (``recorder``).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.errors import UnsupportedModelError

Key = tuple[str, tuple[Hashable, ...]]
"""A function's name and the identities of the parameters (or functions of parameters) that enter it."""


class Kind(Enum):
    """How the outputs of a function depend on the batch."""

    PER_SAMPLE = auto()  # the output has a sample axis: its gradient is filed in the book
    DERIVED = auto()  # a function of parameters and constants alone
    SHARED = auto()  # a sum of something reduced over the batch and a function of parameters: a regulariser
    REFUSED = auto()  # has no exact per-sample gradient


@dataclass(frozen=True)
class Layout:
    """One function as it was observed.

    Args:
        kind: How the outputs depend on the batch.
        leaves: For every leaf of the arguments, its sample axis or ``None``.
        outputs: For every output, its sample axis or ``None``.
        sliceable: Whether the function may run on the rows of one sample: no argument counts samples.
        random: Whether the function draws random numbers.
        reason: Why the function is refused; empty otherwise.
    """

    kind: Kind
    leaves: tuple[SampleAxis | None, ...] = ()
    outputs: tuple[SampleAxis | None, ...] = ()
    sliceable: bool = True
    random: bool = False
    reason: str = ""


@dataclass
class Layouts:
    """The observed layouts of one model, by function, parameters and occurrence in a forward pass."""

    _seen: dict[Key, list[Layout]] = field(default_factory=dict)
    _unanimous: dict[Key, Layout | None] = field(default_factory=dict)

    def add(self, key: Key, layout: Layout) -> None:
        """Note one more occurrence of ``key``."""
        self._seen.setdefault(key, []).append(layout)
        first = self._seen[key][0]
        self._unanimous[key] = layout if layout == first and self._unanimous.get(key, layout) is not None else None

    def replace(self, key: Key, occurrence: int, layout: Layout) -> None:
        """Put ``layout`` in the place of an occurrence noted before."""
        self._seen[key][occurrence] = layout
        same = all(other == layout for other in self._seen[key])
        self._unanimous[key] = layout if same else None

    def find(self, key: Key, occurrence: int) -> Layout | None:
        """Return the layout of an occurrence, or ``None`` if the function was never observed.

        Recomputation and repeated layers change the count of occurrences; it only matters where they differ.

        Raises:
            UnsupportedModelError: If occurrences differ and this one was not observed.
        """
        layout = self._unanimous.get(key)
        if layout is not None or key not in self._seen:
            return layout
        occurrences = self._seen[key]
        if occurrence >= len(occurrences):
            raise UnsupportedModelError(
                f"'{key[0]}' of {describe(key)} was used {len(occurrences)} time(s), in different ways, when the model "
                f"was observed and now for the {occurrence + 1}th time: which use this is cannot be told. Keep the "
                "number of uses fixed, or do not checkpoint this part."
            )
        return occurrences[occurrence]


def describe(key: Key) -> str:
    """Return the names of the parameters in a key, for messages."""
    names: list[str] = []

    def collect(identity: Hashable) -> None:
        if isinstance(identity, tuple):
            for part in identity[1]:
                collect(part)
        else:
            names.append(f"'{identity}'")

    collect(key)
    return ", ".join(dict.fromkeys(names))
