"""Dataclasses as plain values, which JSON and checkpoints keep, and back.

Owns: the plain form. Does not own: what is in it (``record``).
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lightning_dp.errors import PrivacyError

VERSION = 1
"""Of every plain form that says its version."""

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists; an infinite number is ``"infinity"``, one that is none ``None``.

    Args:
        value: A tree of dataclasses, mappings, sequences and plain values.
    """
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "infinity" if value > 0 else None
    return value


def from_plain(kind: type[T], data: object, where: str = "the privacy record") -> T:
    """Return the dataclass that `to_plain` made plain.

    Args:
        kind: The dataclass.
        data: Its plain form.
        where: What ``data`` is, for errors.

    Raises:
        PrivacyError: If it is of another version or malformed.
    """
    if not isinstance(data, Mapping):
        raise _malformed(where, data, "a mapping")
    if "version" in (f.name for f in fields(kind)) and data.get("version") != VERSION:  # type: ignore[arg-type]
        raise PrivacyError(
            f"{where} is of version {data.get('version')!r}; this library reads version {VERSION}. Read it with the "
            "library that wrote it."
        )
    hints = get_type_hints(kind)
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
    if not needed <= data.keys() <= hints.keys():
        raise _malformed(where, sorted(map(str, data)), f"the names {sorted(hints)}")
    return kind(**{name: _value(hints[name], part, f"{where}, {name}") for name, part in data.items()})


def _value(hint: Any, data: object, where: str) -> Any:
    """Return a value of a type from its plain form."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        rest = [part for part in get_args(hint) if part is not type(None)]
        return None if data is None else _value(rest[0], data, where)
    if is_dataclass(hint):
        return from_plain(hint, data, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(data, list | tuple):
        return tuple(_value(get_args(hint)[0], part, where) for part in data)
    if get_origin(hint) is dict and isinstance(data, Mapping):
        return {str(name): _value(get_args(hint)[1], part, where) for name, part in data.items()}
    if hint is float and (data == "infinity" or (isinstance(data, int) and not isinstance(data, bool))):
        return float(data)  # type: ignore[arg-type]
    if isinstance(hint, type) and isinstance(data, hint) and (hint is bool or not isinstance(data, bool)):
        return data
    raise _malformed(where, data, getattr(hint, "__name__", str(hint)))


def _malformed(where: str, found: object, expected: str) -> PrivacyError:
    shown = repr(found)
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    return PrivacyError(f"{where} is malformed: {shown}, expected {expected}. Was the file changed by hand?")
