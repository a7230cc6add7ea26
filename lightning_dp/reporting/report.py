"""`Report`: the facts about a run, and the numbers that follow from them and the ledger.

Owns: which numbers are computed. Does not own: epsilon (``accounting``), text (``markdown``) or files (``files``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from lightning_dp.accounting import (
    Accountant,
    Release,
    claim,
    cross_checked,
    greatest_epsilon,
    histories,
    merge_phases,
)
from lightning_dp.plain import VERSION
from lightning_dp.record import Record, Watched
from lightning_dp.reporting.groups import GroupPrivacy, group_privacy
from lightning_dp.reporting.limits import Limit, limits_of
from lightning_dp.reporting.numbers import library, pld_epsilon, reason_against

_LIBRARY_OF = {"prv": "prv-accountant", "pld": "dp-accounting"}


@dataclass(frozen=True)
class AccountantUsed:
    """An accountant: its name, and the library under it."""

    name: str
    library: str


@dataclass(frozen=True)
class CrossCheck:
    """Epsilon recomputed from the ledger by dp-accounting alone.

    Args:
        library: With its version; ``None`` if it is not installed.
        epsilon: In nats; ``None`` if it was not computed.
        reason: Why it was not.
    """

    library: str | None
    epsilon: float | None
    reason: str | None


@dataclass(frozen=True)
class AtCheckpoint:
    """What a checkpoint alone knows, without the journals beside it.

    Args:
        file: The name of the file.
        num_releases: Logical batches released from until it was saved.
        epsilon: Spent until then, in nats.
    """

    file: str
    num_releases: int
    epsilon: float


@dataclass(frozen=True)
class Privacy:
    """The guarantee.

    Args:
        epsilon: Spent by all releases: an upper bound, in nats; infinite without noise.
        delta: What epsilon is for.
        target_epsilon: The budget; ``None`` without one.
        target_delta: As asked; ``None`` if ``delta`` is the default.
        unit: What is added or removed: ``"example"`` or ``"user"``.
        neighbouring: The relation between data sets.
        num_releases: Logical batches released from, in all.
        steps_left: How many more fit into the budget; ``None`` without one, or if it is not known.
        accountant: Whose epsilon it is; ``"prv"`` is checked by ``"pld"`` if that is installed, and the larger counts.
        cross_check: The second opinion.
        claim: What may be claimed, and under which assumption.
        groups: What holds for several examples of one person.
        at_checkpoint: What the checkpoint knew that the report was made from; ``None`` for a report of a live run.
    """

    epsilon: float
    delta: float
    target_epsilon: float | None
    target_delta: float | None
    unit: str
    neighbouring: str
    num_releases: int
    steps_left: int | None
    accountant: AccountantUsed
    cross_check: CrossCheck
    claim: str
    groups: tuple[GroupPrivacy, ...]
    at_checkpoint: AtCheckpoint | None


@dataclass(frozen=True)
class LedgerRow:
    """Releases of one kind.

    Args:
        noise_multiplier: As accounted: all releases from one draw count as one with less noise.
        sample_rate: The probability of each unit to be in the logical batch.
        num_releases: How many such.
        num_units: How many units the data set had; ``None`` if that was not recorded.
        unit: What was added or removed.
        partition: The name of the data set; those of different names have no unit in common. ``None``: nothing is said.
        sampling: How units were drawn.
    """

    noise_multiplier: float
    sample_rate: float
    num_releases: int
    num_units: int | None
    unit: str
    partition: str | None
    sampling: str


@dataclass(frozen=True)
class Report:
    """All that is known about what a run released.

    Args:
        created: When, in UTC.
        privacy: The guarantee.
        ledger: Every release.
        record: The facts.
        not_covered: What the guarantee does not cover.
        watched: What the callback saw.
        version: Of this form.
    """

    created: str
    privacy: Privacy
    ledger: tuple[LedgerRow, ...]
    record: Record
    not_covered: tuple[Limit, ...]
    watched: Watched
    version: int = VERSION


def make_report(
    record: Record,
    counts: Mapping[Release, int],
    accountant: Accountant,
    watched: Watched | None = None,
    at_checkpoint: AtCheckpoint | None = None,
) -> Report:
    """Compute what follows from the facts and the ledger.

    Guarantee: epsilon is the accountant's, cross-checked where that is possible, of all releases and nothing else.

    Args:
        record: The facts.
        counts: How many releases of each kind there were.
        accountant: Whose epsilon counts.
        watched: What a callback saw, if there was one.
        at_checkpoint: What a checkpoint alone knew, if the report is made from one.
    """
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        privacy=_privacy(record, counts, accountant, at_checkpoint),
        ledger=tuple(LedgerRow(**release.as_row(count)) for release, count in counts.items()),
        record=record,
        not_covered=limits_of(record, watched),
        watched=watched or Watched(),
    )


def spent(counts: Mapping[Release, int], accountant: Accountant, delta: float) -> float:
    """Return the epsilon of releases, as a run reports it: in nats."""
    return greatest_epsilon(cross_checked(accountant), histories(counts), delta)


def _privacy(
    record: Record, counts: Mapping[Release, int], accountant: Accountant, at_checkpoint: AtCheckpoint | None
) -> Privacy:
    asked, unit = record.accounting, record.mechanism.unit
    phases = merge_phases(release.times(count) for release, count in counts.items())
    epsilon = spent(counts, accountant, asked.delta)
    return Privacy(
        epsilon=epsilon,
        delta=asked.delta,
        target_epsilon=asked.target_epsilon,
        target_delta=asked.target_delta,
        unit=unit,
        neighbouring="add or remove one",
        num_releases=sum(counts.values()),
        steps_left=_steps_left(record, counts),
        accountant=AccountantUsed(accountant.name, _library_of(record, accountant)),
        cross_check=_cross_check(counts, asked.delta, accountant),
        claim=claim(phases, accountant, target_epsilon=asked.target_epsilon, epsilon=epsilon, unit=unit),
        # Of all phases together: the examples of one person may lie in several partitions.
        groups=group_privacy(phases, asked.delta) if unit == "example" and accountant.runs == 1 else (),
        at_checkpoint=at_checkpoint,
    )


def _steps_left(record: Record, counts: Mapping[Release, int]) -> int | None:
    """What was left when the facts were recorded, less what was released since; unknown if there are several kinds."""
    left = record.accounting.steps_left
    since = sum(counts.values()) - record.accounting.num_releases
    if left is None or (since and len(counts) > 1):
        return None
    return max(0, left - since)


def _library_of(record: Record, accountant: Accountant) -> str:
    name = _LIBRARY_OF.get(accountant.name, "lightning-dp")
    return f"{name} {record.versions[name]}" if name in record.versions else name


def _cross_check(counts: Mapping[Release, int], delta: float, accountant: Accountant) -> CrossCheck:
    all_phases = histories(counts)
    reason = next(filter(None, map(reason_against, all_phases)), None)
    if accountant.runs != 1:
        reason = "it knows one run, and epsilon is that of a search for the best of several"
    epsilon = None if reason else max(pld_epsilon(phases, delta) for phases in all_phases)
    return CrossCheck(library(), epsilon, reason)
