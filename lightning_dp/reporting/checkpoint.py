"""A report from a checkpoint alone: neither the model's class nor the data are needed.

Owns: the reading of what `DPStrategy` and `PrivacyReport` put into a checkpoint. Does not own: its writing.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_dp.accounting import (
    Accountant,
    Journal,
    Ledger,
    RDPBestOf,
    RDPFilter,
    journal_places,
    resolve_accountant,
)
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.plain import from_plain
from lightning_dp.record import Point, Record, Watched
from lightning_dp.reporting.report import AtCheckpoint, Report, make_report, spent

WATCHED_KEY = "watched"
"""Where the callback keeps in its state what it saw."""


def read_report(path: str | os.PathLike[str], accountant: str | Accountant | None = None) -> Report:
    """Return the report of a checkpoint file; nothing is written and no code from the file is run.

    Releases that the journals beside it know of count, too: they are what training spent on the data by now.

    Args:
        path: A checkpoint of a private fit.
        accountant: Whose epsilon counts. Default: that of the fit.

    Raises:
        PrivacyConfigurationError: If it is no such file.
        PrivacyError: If what it holds about privacy, or a journal beside it, is malformed.
    """
    return report_of(_load(Path(path)), Path(path), accountant)


def report_of(checkpoint: Mapping[str, Any], path: Path, accountant: str | Accountant | None = None) -> Report:
    """Return the report of a loaded checkpoint.

    Args:
        checkpoint: What the file holds.
        path: The file; the journals are looked for beside it.
        accountant: Whose epsilon counts. Default: that of the fit.

    Raises:
        PrivacyConfigurationError: If it is not from a private fit.
        PrivacyError: If what it holds about privacy, or a journal beside it, is malformed.
    """
    state = _private_state(checkpoint, path)
    record = from_plain(Record, state["record"], f"the privacy record in {path}")
    _check_selected(accountant, record, path)
    chosen, ledger = _accountant(_ordered(accountant or record.accounting.accountant, state), record, path), Ledger()
    ledger.merge(state["ledger"])
    alone = AtCheckpoint(path.name, ledger.num_releases, spent(ledger.counts, chosen, record.accounting.delta))
    beside, *others = journal_places(path, state)
    Journal.read(beside, ledger, *others)
    return make_report(record, ledger.counts, chosen, _watched(checkpoint, path, alone), alone)


def _ordered(accountant: str | Accountant, state: Mapping[str, Any]) -> str | Accountant:
    """A filter has the order that was fixed before the first release of the fit, if that had one."""
    order = (state.get("terms") or [{}])[-1].get("filter_order")
    return RDPFilter(order) if accountant == RDPFilter.name and order is not None else accountant


def _accountant(accountant: str | Accountant, record: Record, path: Path) -> Accountant:
    """The accountant, with what it fixes by the target."""
    asked = record.accounting
    try:
        found = resolve_accountant(accountant)
        return found if asked.target_epsilon is None else found.for_target(asked.target_epsilon, asked.delta)
    except PrivacyConfigurationError as error:
        raise PrivacyConfigurationError(
            f"no report of {path}: {error} A fit with an accountant of your own needs it again: "
            "lightning_dp.reporting.read_report(path, accountant)."
        ) from error


def _check_selected(accountant: str | Accountant | None, record: Record, path: Path) -> None:
    """Raise if another accountant would forget the other runs of a search."""
    used = record.accounting.accountant
    if accountant is not None and RDPBestOf.from_name(used) and resolve_accountant(accountant).name != used:
        raise PrivacyConfigurationError(
            f"no report of {path} by accountant={accountant!r}: it is the best of a random number of runs, and the "
            f"others would be forgotten. Leave the accountant out: {used!r} counts them."
        )


def _private_state(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    state = checkpoint.get("lightning_dp") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or "ledger" not in state:
        raise PrivacyConfigurationError(
            f"{path} is no checkpoint of a private fit: it holds no ledger of releases. Give a checkpoint that was "
            "saved while, or after, Trainer(strategy=DPStrategy(...)).fit ran."
        )
    if "record" not in state:
        raise PrivacyConfigurationError(
            f"{path} holds a ledger of releases, but no record of the run: it was saved before the fit had seen its "
            "training data, or by an earlier version of this library. Give a later checkpoint, or resume from this "
            "one and save again."
        )
    return state


def _watched(checkpoint: Mapping[str, Any], path: Path, alone: AtCheckpoint) -> Watched | None:
    """What the callback saw until the checkpoint, if its state is in there."""
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if str(key).partition("{")[0] == "PrivacyReport" and WATCHED_KEY in state:
            watched = from_plain(Watched, state[WATCHED_KEY], f"the history in {path}")
            return _until(watched, checkpoint["global_step"], alone)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _until(watched: Watched, step: int, alone: AtCheckpoint) -> Watched:
    """End the history with the checkpoint."""
    if watched.history and watched.history[-1].num_releases == alone.num_releases:
        return watched
    return replace(watched, history=(*watched.history, Point("checkpoint", step, alone.num_releases, alone.epsilon)))


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise PrivacyConfigurationError(f"{path} is no file: expected a checkpoint, such as 'last.ckpt'.")
    try:
        # Mapped, not read: the weights are not needed.
        loaded: Mapping[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise PrivacyConfigurationError(
            f"{path} cannot be read as a checkpoint of tensors and plain values ({_first_line(error)}). If it "
            "is a checkpoint that you trust and that holds other objects, such as hyperparameters of your own classes: "
            "lightning_dp.reporting.report_of(torch.load(path, weights_only=False), Path(path))."
        ) from error
    return loaded
