"""The record of a search on disk, so that one that was interrupted goes on with what it has spent.

Owns: the file ``search.json``, and what it holds of a search by linear scaling: the runs that were made, and the
ledger. Does not own: what it holds of a random search (``candidates``), or releases of a run that was interrupted: the
journal beside it knows them (``accounting.journal``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dp.accounting.durable import replace_file
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.plain import to_plain
from lightning_dp.tuning.trials import Outcome, Search

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_NAME, _VERSION = "search.json", 1


class SearchFile:
    """The file of one search, for one process at a time.

    Args:
        directory: Made if it is not there.
        search: All that the search follows from, a dataclass: a directory belongs to one search.
        names: What the file holds beside.
    """

    def __init__(self, directory: Path, search: Any, names: Set[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._names = directory, names
        self._terms: dict[str, Any] = json.loads(json.dumps(asdict(search)))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out, where the system has locks of files: two at once would spend two budgets.

        Raises:
            PrivacyConfigurationError: If one is at work on this search.
        """
        if fcntl is None:
            yield
            return
        with open(self.directory / "search.lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PrivacyConfigurationError(
                    f"directory={str(self.directory)!r}: another process is at work on this search, and both would "
                    "spend its budget. Wait for it, or give another directory."
                ) from error
            yield

    def put(self, state: Mapping[str, Any]) -> None:
        """Keep what the file holds beside the search on disk."""
        state = {"version": _VERSION, "search": self._terms, **state}
        replace_file(self.directory / _NAME, json.dumps(state, indent=1))

    def get(self) -> dict[str, Any] | None:
        """Return what was kept; ``None`` if nothing was.

        Raises:
            PrivacyConfigurationError: If the directory belongs to another search, or to a run that is none.
            PrivacyError: If the file cannot be read.
        """
        path = self.directory / _NAME
        if not path.exists():
            if any(self.directory.glob("privacy-journal-*.json")):
                raise PrivacyConfigurationError(
                    f"directory={str(self.directory)!r} has the journal of a run, and no {_NAME}: what was spent there "
                    "would be forgotten. Give a directory of its own to every search."
                )
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, terms = state["version"], state["search"]
            if version != _VERSION or not isinstance(terms, dict) or not self._names <= state.keys():
                raise ValueError(f"version {version}")
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"{path} cannot be read ({error!r}): it holds what a search has spent, so it is not ignored. Restore "
                "it, or begin a new search, with a budget of its own, in another directory."
            ) from error
        self._check(terms)
        return state

    def _check(self, before: Mapping[str, Any]) -> None:
        changed = [
            f"{name} is now {self._terms.get(name)} and was {before.get(name)}"
            for name in sorted(self._terms.keys() | before.keys())
            if self._terms.get(name) != before.get(name)
        ]
        if changed:
            raise PrivacyConfigurationError(
                f"directory={str(self.directory)!r} holds another search: {'; '.join(changed)}. Go on with that one as "
                "it was, or give another directory: a new search has a budget of its own, on top of what was spent."
            )


class History(SearchFile):
    """The runs that a search by linear scaling has made.

    Guarantee: a run is on disk before the next one begins, and the ledger before the first release, so that the journal
    in this directory is recognised as its continuation.

    Args:
        directory: Made if it is not there.
        search: What is searched for, and by what shares.
    """

    def __init__(self, directory: Path, search: Search) -> None:
        super().__init__(directory, search, {"outcomes", "ledger"})
        self.ledger: Mapping[str, Any] | None = None
        self.outcomes: list[Outcome] = []

    def read(self) -> None:
        """Find out what was made before; see `get` for what it raises."""
        state = self.get()
        if state is not None:
            self.ledger, self.outcomes = state["ledger"], [_outcome(row) for row in state["outcomes"]]

    def write(self, ledger: Mapping[str, Any]) -> None:
        """Keep everything on disk.

        Args:
            ledger: Its state.
        """
        outcomes = [{**to_plain(one), "score": repr(one.score)} for one in self.outcomes]  # JSON has no NaN
        self.put({"outcomes": outcomes, "ledger": ledger})


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**row, "score": float(row["score"])})
