"""Fits with a report, and what their files are compared with."""

import json
from pathlib import Path

from jsonschema import Draft202012Validator

import lightning_dp as ldp
from lightning_dp.reporting import schema
from tests.accounting.oracles import pld_epsilon
from tests.models import Regression, loader, trainer


def fitted(module=None, data=None, strategy=None, callbacks=(), ckpt_path=None, validation=None, **settings):
    strategy = strategy or ldp.DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    fit = trainer(strategy, callbacks=[ldp.PrivacyReport(), *callbacks], **settings)
    fit.fit(module or Regression(), data or loader(), validation, ckpt_path=ckpt_path)
    return fit


def written(folder=".", name="privacy_report"):
    """Return the JSON of a report, after a look at it that is not ours."""
    data = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator(schema()).validate(data)
    return data


def recomputed(data):
    """Return epsilon by dp-accounting alone, from the ledger in the JSON."""
    releases = [(row["sample_rate"], row["noise_multiplier"], row["num_releases"]) for row in data["ledger"]]
    return pld_epsilon(releases, data["privacy"]["delta"])


def agrees(data):
    exact = recomputed(data)
    return exact <= data["privacy"]["epsilon"] <= 1.02 * exact
