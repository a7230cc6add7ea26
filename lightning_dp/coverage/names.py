"""Short names for many parameters: layers that repeat are one line, ``blocks.{0..11}.weight``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

Part = str | tuple[int, ...]
"""A part of a dotted name: a word, or the numbers that stand at its place."""


def collapsed(
    items: Sequence[Item], name_of: Callable[[Item], str], alike: Callable[[Item], Hashable] = lambda item: None
) -> list[tuple[str, list[Item]]]:
    """Put items together whose names differ in numbers only.

    Args:
        items: What is named.
        name_of: Returns the dotted name of an item.
        alike: Items are put together only if this is equal for them.

    Returns:
        Pairs of a name and the items it stands for: exactly one for each combination of its numbers.
    """
    groups = [(_parts(name_of(item)), [item]) for item in items]
    for at in range(max((len(parts) for parts, _ in groups), default=0)):
        groups = _merged(groups, at, alike)
    return [(".".join(map(_shown, parts)), members) for parts, members in groups]


def _merged(
    groups: list[tuple[tuple[Part, ...], list[Item]]], at: int, alike: Callable[[Item], Hashable]
) -> list[tuple[tuple[Part, ...], list[Item]]]:
    """Merge the groups whose names differ at one place only, and there in numbers."""
    merged: dict[Hashable, tuple[tuple[Part, ...], list[Item]]] = {}
    for parts, members in groups:
        here = parts[at] if at < len(parts) else ""
        if isinstance(here, str):
            merged[parts, alike(members[0])] = parts, members
            continue
        rest = (parts[:at], parts[at + 1 :], alike(members[0]))
        before, earlier = merged.get(rest, (parts, []))
        numbers = before[at] if earlier else ()
        assert isinstance(numbers, tuple), "groups of one key have numbers here"
        merged[rest] = (*parts[:at], (*numbers, *here), *parts[at + 1 :]), [*earlier, *members]
    return list(merged.values())


def _parts(name: str) -> tuple[Part, ...]:
    return tuple((int(part),) if part.isdecimal() else part for part in name.split("."))


def _shown(part: Part) -> str:
    if isinstance(part, str):
        return part
    first, last = min(part), max(part)
    if len(part) == 1:
        return str(first)
    if sorted(part) == list(range(first, last + 1)):
        return f"{{{first}..{last}}}"
    return f"{{{','.join(map(str, sorted(part)))}}}"
