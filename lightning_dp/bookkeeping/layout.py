"""What was observed of one function that a trainable parameter enters, and where such observations are kept.

Owns: `Layout` and `Layouts`. Does not own: the observing (``observation``) or the use (``recorder``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from lightning_dp.bookkeeping.axes import SampleAxis
from lightning_dp.errors import UnsupportedModelError

Key = tuple[str, tuple[Hashable, ...]]
"""A function's name and the identities of the parameters (or functions of parameters) that enter it."""


REPEATING = {"stack", "cat", "concat", "concatenate", "hstack", "vstack", "dstack"}


def key_of(name: str, identities: Iterable[Hashable]) -> Key:
    """Return the key of a function; in ``torch.stack([p] * B)`` the number of samples must not be part of it."""
    found = tuple(identities)
    return name, tuple(dict.fromkeys(found)) if name in REPEATING else found


_IN_TWO_WAYS = (
    "training steps use it in different ways: its samples lie along another axis, or in another order, than in a step "
    "that was observed before, and a step does not tell which way it takes. Use it in one way."
)


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
        packed: Whether a recurrent layer's function was given packed sequences: the axis of the data then holds another
            number of rows of every sample, and only the rule of that function knows which.
        reason: Why the function is refused; empty otherwise.
        where: The line of the user's code that called it.
    """

    kind: Kind
    leaves: tuple[SampleAxis | None, ...] = ()
    outputs: tuple[SampleAxis | None, ...] = ()
    sliceable: bool = True
    random: bool = False
    packed: bool = False
    reason: str = ""
    where: str = field(default="", compare=False)

    def places(self) -> Hashable:
        """Return where the samples lie, whatever the number of rows."""
        axes = (*self.leaves, *self.outputs)
        return self.kind, self.packed, tuple(axis and (axis.dim, axis.is_binding, axis.together) for axis in axes)


@dataclass
class _Uses:
    """The layouts of one function in the order of its uses: those with a gradient, and those under ``no_grad``."""

    with_gradient: list[Layout] = field(default_factory=list)
    without: list[Layout] = field(default_factory=list)

    def all(self) -> list[Layout]:
        """Return those that a pass goes by."""
        return self.with_gradient or self.without

    def places(self) -> set[Hashable]:
        """Return where the samples lie in each; nothing for refused ones. Rows that may change do not matter."""
        return {layout.places() for layout in self.all() if layout.kind is not Kind.REFUSED}


@dataclass
class Layouts:
    """The observed layouts of one model, by function, parameters and occurrence in a forward pass.

    The number of an occurrence only matters where occurrences differ. There it is trusted in a forward pass that runs
    the function exactly as often as it was observed (`check_counts`), and never in a recomputation, whose order is
    another: reentrant checkpoints run last layers first.
    """

    _uses: dict[Key, _Uses] = field(default_factory=dict)
    _unanimous: dict[tuple[Key, bool], Layout | None] = field(default_factory=dict)

    def add(self, key: Key, layout: Layout, with_gradient: bool = True) -> None:
        """Note one more occurrence of ``key``; those under ``no_grad`` are constants, or will be recomputed."""
        uses = self._uses.setdefault(key, _Uses())
        (uses.with_gradient if with_gradient else uses.without).append(layout)
        self._unanimous.clear()

    def extend(self, other: Layouts, decisive: str) -> bool:
        """Add the functions that another observation saw and this one did not; return whether there were any.

        Args:
            other: The other observation, with other random draws.
            decisive: The reason of a refusal that holds whatever was observed otherwise.
        """
        new = {
            key: uses
            for key, uses in other._uses.items()
            if key not in self._uses or any(layout.reason == decisive for layout in uses.with_gradient)
        }
        added = not new.keys() <= self._uses.keys()
        for key in other._uses.keys() & self._uses.keys() - new.keys():
            mine, its = self._uses[key], other._uses[key]
            if mine.places() and its.places() and mine.places() != its.places():
                refused = Layout(Kind.REFUSED, reason=_IN_TWO_WAYS, where=its.all()[0].where)
                self._uses[key] = _Uses([refused], [refused])
        self._uses |= new
        self._unanimous.clear()
        return added

    def fix(self, rows: int) -> None:
        """Make so many rows of a sample binding where they were seen."""

        def fixed(axes: tuple[SampleAxis | None, ...]) -> tuple[SampleAxis | None, ...]:
            return tuple(replace(axis, fixed=True) if axis and axis.rows == rows else axis for axis in axes)

        def bound(layouts: list[Layout]) -> list[Layout]:
            return [replace(use, leaves=fixed(use.leaves), outputs=fixed(use.outputs)) for use in layouts]

        self._uses = {key: _Uses(bound(uses.with_gradient), bound(uses.without)) for key, uses in self._uses.items()}
        self._unanimous.clear()

    @property
    def names(self) -> set[str]:
        """The parameters that were seen in any function."""
        return {name for key in self._uses for name in names_in(key)}

    def find(self, key: Key, occurrence: int, recomputed: bool = False) -> Layout | None:
        """Return the layout of an occurrence, or ``None`` if the function was never observed.

        Args:
            key: The function and its parameters.
            occurrence: How often it was used before in this forward pass.
            recomputed: Whether this is a use in the backward pass, by activation checkpointing.

        Raises:
            UnsupportedModelError: If occurrences differ and which one this is cannot be told.
        """
        layout = self._unanimous.get((key, recomputed))
        if layout is not None:
            return layout
        if key not in self._uses:
            return None
        layout = self._agreed(key, recomputed)
        if layout is not None:
            return layout
        uses = self._uses[key].with_gradient
        if recomputed or occurrence >= len(uses):
            raise _ambiguous(key, len(uses))
        return uses[occurrence]

    def where(self, name: str) -> str:
        """Return the functions that a parameter was seen to enter, with the lines that called them, for messages."""
        found = {
            f"{key[0]}, {layout.where}": None
            for key, uses in self._uses.items()
            if name in key[1]
            for layout in (*uses.with_gradient, *uses.without)
        }
        return "; ".join(list(found)[:3])

    def check_counts(self, counts: Mapping[Key, int]) -> None:
        """Raise if occurrences that differ were told apart by their number, and there were more or fewer of them."""
        for key, count in counts.items():
            if key in self._uses and self._agreed(key, False) is None and count != len(self._uses[key].with_gradient):
                raise _ambiguous(key, len(self._uses[key].with_gradient))

    def _agreed(self, key: Key, recomputed: bool) -> Layout | None:
        """Return the layout that all occurrences share, or ``None``."""
        if (key, recomputed) not in self._unanimous:
            uses = self._uses[key]
            layouts = uses.with_gradient
            if recomputed or not layouts:
                layouts = [*layouts, *uses.without]
            same = all(layout == layouts[0] for layout in layouts)
            self._unanimous[key, recomputed] = layouts[0] if same else None
        return self._unanimous[key, recomputed]


def _ambiguous(key: Key, count: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"'{key[0]}' of {describe(key)} was used {count} time(s), in different ways, when the model was observed, and "
        "now in another number or order: which use this is cannot be told. Keep the number of uses fixed, or do not "
        "checkpoint this part."
    )


def describe(key: Key) -> str:
    """Return the names of the parameters in a key, for messages."""
    return ", ".join(f"'{name}'" for name in names_in(key))


def names_in(key: Key) -> tuple[str, ...]:
    """Return the names of the parameters in a key."""
    names: list[str] = []

    def collect(identity: Hashable) -> None:
        if isinstance(identity, tuple):
            for part in identity[1]:
                collect(part)
        else:
            names.append(str(identity))

    collect(key)
    return tuple(dict.fromkeys(names))
