"""Patterns that name parameters, wherever users name some.

Owns: what a pattern fits.
"""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern fits a parameter's name as a whole, or is a run of its dotted parts."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
