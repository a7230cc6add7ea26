"""The facts about a private run, where they are known.

Owns: the filling in of a `Record`. Does not own: which facts there are (``lightning_dp.record``), or any epsilon.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from lightning_dp.accounting import Accountant, RDPBestOf
from lightning_dp.bookkeeping import BookKeeping, Keeping
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.plain import from_plain, to_plain
from lightning_dp.record import (
    AccountingRecord,
    MechanismRecord,
    OptimizerRecord,
    ParameterRecord,
    Record,
    SamplerRecord,
    SelfCheckRecord,
    TrainingRecord,
)
from lightning_dp.strategies import checks

if TYPE_CHECKING:
    from lightning_dp.strategies.preparing import Found
    from lightning_dp.strategies.run import PrivateRun

_LIBRARIES = ("lightning-dp", "torch", "lightning", "numpy", "prv-accountant", "dp-accounting")


def record_of(run: PrivateRun) -> Record | None:
    """Return the facts about a run; ``None`` before it has seen its training data."""
    if run.mechanism is None or run.loader is None:
        return None
    return Record(
        mechanism=_mechanism(run),
        sampler=_sampler(run),
        accounting=_accounting(run),
        training=run.training,
        private_statistics=run.settings.private_statistics,
        public_mix=run.public_mix,
        recorded=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=dict(_versions()),
    )


def plain_record(run: PrivateRun) -> dict[str, Any]:
    """Return what goes into a checkpoint beside the ledger."""
    record = record_of(run)
    return {} if record is None else {"record": to_plain(record)}


def earlier_record(state: Mapping[str, Any]) -> Record | None:
    """Return the facts about the fit before a checkpoint, if the checkpoint knows them."""
    return from_plain(Record, state["record"]) if "record" in state else None


def check_selected(earlier: Record | None, accountant: Accountant) -> None:
    """Raise if a run would go on from the best of several and forget the others.

    Args:
        earlier: The facts about the fit before a checkpoint.
        accountant: Whose epsilon counts from now on.

    Raises:
        PrivacyConfigurationError: If it is not the one that accounts for the others.
    """
    before = RDPBestOf.from_name(earlier.accounting.accountant) if earlier else None
    if before is not None and accountant.name != before.name:
        raise PrivacyConfigurationError(
            f"accountant={accountant.name!r} from a checkpoint that is the best of a random number of runs: the others "
            f"would be forgotten. Give accountant={before.name!r}, which counts them and whatever follows."
        )


def training_record(module: pl.LightningModule, run: PrivateRun, found: Found, keeping: Keeping) -> TrainingRecord:
    """Return what a fit trains.

    Args:
        module: The user's module.
        run: Gives the settings, and what it trained before: a parameter that was ever trained stays among them.
        found: What was found out about the training step.
        keeping: Finds the per-sample gradients.
    """
    before = run.training
    public = {n: p for group in checks.named_groups(module, found.public).values() for n, p in group.items()}
    trained = _joined(before.trained if before else (), found.trained)
    noiseless = _joined(before.public if before else (), public)
    known = {parameter.name for parameter in (*trained, *noiseless)}
    rest = {name: p for name, p in module.named_parameters() if name not in known}
    return TrainingRecord(
        model=type(module).__name__,
        engine="book" if isinstance(keeping, BookKeeping) else "loop",
        optimization="automatic" if module.automatic_optimization else "manual",
        optimizers=tuple(OptimizerRecord(type(o).__name__, o not in found.public) for o in module.trainer.optimizers),
        trained=trained,
        public=noiseless,
        frozen=tuple(_parameters({name: p for name, p in rest.items() if not p.requires_grad})),
        untrained=tuple(_parameters({name: p for name, p in rest.items() if p.requires_grad})),
        self_check=_self_check(run, found, keeping),
    )


def _mechanism(run: PrivateRun) -> MechanismRecord:
    mechanism, clipping = run.schedule.base, run.clipping
    return MechanismRecord(
        noise_multiplier=mechanism.noise_multiplier,
        clipping=str(clipping),
        max_grad_norm=clipping.max_grad_norm,
        sensitivity=clipping.sensitivity,
        expected_batch_size=mechanism.expected_batch_size,
        sample_rate=mechanism.sample_rate,
        releases_per_draw=mechanism.releases_per_draw,
        unit=mechanism.unit,
        schedule=run.settings.schedule,
    )


def _sampler(run: PrivateRun) -> SamplerRecord:
    loader = run.loader
    assert loader is not None, "asked before"
    return SamplerRecord(
        kind="poisson",
        dataset=type(loader.dataset).__name__,
        num_examples=len(loader.dataset),  # type: ignore[arg-type]
        num_units=loader.units.num_units,
        examples_per_unit=loader.units.examples_per_unit // loader.units.views,
        batches_per_epoch=len(loader),
        max_physical_batch_size=loader.max_physical_batch_size,
        views_per_example=loader.units.views,
    )


def _accounting(run: PrivateRun) -> AccountingRecord:
    return AccountingRecord(
        accountant=run.budget.accountant.name,
        delta=run.budget.delta,
        target_epsilon=run.settings.target_epsilon,
        target_delta=run.settings.target_delta,
        num_releases=run.ledger.num_releases,
        steps_left=run.budget.releases_left,
    )


def _self_check(run: PrivateRun, found: Found, keeping: Keeping) -> SelfCheckRecord:
    if not isinstance(keeping, BookKeeping):
        return SelfCheckRecord("not needed")  # a sample that is alone in its batch depends on no other
    if not run.settings.self_check:
        return SelfCheckRecord("off")
    checked = found.observer.num_checked
    return SelfCheckRecord("passed" if checked else "too few samples", checked)


def _joined(before: Iterable[ParameterRecord], now: Mapping[str, nn.Parameter]) -> tuple[ParameterRecord, ...]:
    known = {parameter.name: parameter for parameter in before}
    return tuple((known | {parameter.name: parameter for parameter in _parameters(now)}).values())


def _parameters(named: Mapping[str, nn.Parameter]) -> Iterable[ParameterRecord]:
    return (ParameterRecord(name, tuple(p.shape), p.numel()) for name, p in named.items())


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    """The versions of the libraries that are installed: looking them up reads files, and checkpoints are many."""
    found = [("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:  # an optional one, or a source tree that is not installed
            continue
    return tuple(found)
