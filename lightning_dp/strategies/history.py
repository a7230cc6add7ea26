"""What was released: by this run, by those that it goes on from, and by the processes beside this one.

Owns: the ledger, its journal, the terms of what is in it, and what of them goes into checkpoints. Does not own: what
may be released yet (``run``, ``budget``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_dp.accounting import Journal, Ledger, journal_places
from lightning_dp.processes import Processes
from lightning_dp.strategies.terms import Terms


class History:
    """Outlives a single fit.

    Guarantee: the ledger only grows.
    """

    def __init__(self) -> None:
        self.ledger, self.journal = Ledger(), Journal()
        self.settled: Terms | None = None
        """The terms of the present fit."""
        self.agreed: dict[str | None, Terms] = {}
        """Those under which something was released before it, by partition, the latest last."""
        self._released_before = 0  # when the present terms were settled

    def join(self, processes: Processes) -> None:
        """Go on together with other processes: all keep the same ledger."""
        self.ledger.continue_as(processes.broadcast(self.ledger.own_segment))
        self.merge(processes)

    def merge(self, processes: Processes) -> None:
        """Count what any of the processes knows of: each may have read journals that others do not see."""
        for history in processes.gather(self.ledger.state_dict()):
            self.ledger.merge(history)

    def begin_fit(self) -> None:
        """Take the terms for agreed under which something was released by now."""
        self.agreed, self._released_before = self._agreed_by_now, self.ledger.num_releases

    @property
    def _agreed_by_now(self) -> dict[str | None, Terms]:
        if self.settled is None or self.ledger.num_releases == self._released_before:
            return self.agreed
        return _with(self.agreed, self.settled)

    def state(self, path: Path) -> dict[str, Any]:
        """Return what goes into a checkpoint that is about to be saved."""
        terms = self._agreed_by_now
        if self.settled is not None:  # a crash may part the releases that follow from the next checkpoint
            terms = _with(terms, self.settled)
        return {
            "ledger": self.ledger.state_dict(),
            "terms": [agreed.state_dict() for agreed in terms.values()],
            "directory": str(path.parent.absolute()),
        }

    def read(self, state: Mapping[str, Any] | None, path: Path) -> None:
        """Count every release that a checkpoint and the journals beside it know of.

        Args:
            state: What `state` returned; ``None`` if the checkpoint has none.
            path: Of the checkpoint.
        """
        state = state or {}
        self.agreed = dict(self._agreed_by_now)  # also of a fit of this process that the checkpoint knows nothing of
        if state:
            self.ledger.merge(state["ledger"])
        beside, *others = journal_places(path, state)
        self.journal.read(beside, self.ledger, *others)
        released_from = {release.partition for release in self.ledger.counts}
        for terms in map(Terms.from_state, state.get("terms", [])):
            if terms.partition in released_from:
                self.agreed = _with(self.agreed, terms)

    def went_on(self, processes: Processes) -> None:
        """Count what any process has read; what was agreed so far is settled anew."""
        self.merge(processes)
        self._released_before = self.ledger.num_releases

    def keep_in(self, directory: Path, history: Mapping[str, Any] | None) -> None:
        """Keep the journal in a directory from now on, and count what was released there before.

        Args:
            directory: An existing local directory.
            history: The state of an earlier process's ledger, whose journal may be there; ``None`` if there was none.
        """
        if history is not None:
            self.ledger.merge(history)
            self.journal.read(directory, self.ledger)
        self.journal.add_directory(directory)

    def close(self) -> None:
        """Leave the exact number of releases on disk."""
        self.journal.close(self.ledger)


def _with(agreed: Mapping[str | None, Terms], latest: Terms) -> dict[str | None, Terms]:
    """Return the terms of all partitions, those of one replaced."""
    others = {name: terms for name, terms in agreed.items() if name != latest.partition}
    return {**others, latest.partition: latest}
