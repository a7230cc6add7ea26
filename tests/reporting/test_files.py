"""The schema, and what Markdown and figure show of a report."""

import copy
import json
from dataclasses import replace
from datetime import datetime

import pytest
from jsonschema import Draft202012Validator, ValidationError

from lightning_dp.accounting import Release, resolve_accountant
from lightning_dp.record import AccountingRecord, MechanismRecord, Point, Record, SamplerRecord, Watched
from lightning_dp.reporting import as_json, as_markdown, make_report, schema
from lightning_dp.reporting.figure import draw
from lightning_dp.reporting.groups import GroupPrivacy
from lightning_dp.reporting.report import CrossCheck

RECORD = Record(
    mechanism=MechanismRecord(1.0, "flat", 1.0, 1.0, 5.0, 0.25, 1),
    sampler=SamplerRecord("poisson", "My|Dataset", 20, 20, 1, 4, 5),
    accounting=AccountingRecord("prv", 1e-3, 3.0, None, 4, 2),
    training=None,
    private_statistics=False,
    recorded="2026-01-01T00:00:00+00:00",
    versions={"torch": "2.6"},
)
HISTORY = (
    Point("start", 0, 0, 0.0),
    Point("validation", 2, 2, 1.5, {"val_loss": 0.5, "val_accuracy": None}, 0.25),
    Point("end", 4, 4, 2.0, {}, 0.75),
)


@pytest.fixture
def report():
    return make_report(RECORD, {Release(1.0, 0.25): 4}, resolve_accountant("rdp"), Watched(HISTORY))


def test_the_schema_is_one_and_the_report_follows_it(report):
    Draft202012Validator.check_schema(schema())
    data = json.loads(as_json(report))
    Draft202012Validator(schema()).validate(data)
    assert data["$schema"] == schema()["$id"]
    assert data["version"] == schema()["properties"]["version"]["const"] == 1
    assert datetime.fromisoformat(data["created"]).utcoffset().total_seconds() == 0


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("privacy", "epsilon"), -1.0),
        (("privacy", "epsilon"), "large"),
        (("privacy", "delta"), 1.5),
        (("privacy", "unit"), "row"),
        (("version",), 2),
        (("record", "sampler", "num_examples"), 0),
        (("record", "more"), 1),
        (("watched", "history"), {}),
    ],
)
def test_the_schema_refuses_others(report, at, value):
    data = json.loads(as_json(report))
    part = data
    for name in at[:-1]:
        part = part[name]
    part[at[-1]] = value
    with pytest.raises(ValidationError):
        Draft202012Validator(schema()).validate(data)


def test_the_schema_needs_every_field(report):
    data = json.loads(as_json(report))
    for name in data:
        less = copy.copy(data)
        del less[name]
        with pytest.raises(ValidationError):
            Draft202012Validator(schema()).validate(less)


def test_markdown_rounds_an_upper_bound_up(report):
    privacy = replace(report.privacy, epsilon=1.23451)
    assert "**epsilon 1.2346** of 3 at delta 0.001" in as_markdown(replace(report, privacy=privacy))


def test_markdown_tells_the_views_of_an_example(report):
    assert "each as" not in as_markdown(report)
    sampler = replace(report.record.sampler, views_per_example=5)
    shown = as_markdown(replace(report, record=replace(report.record, sampler=sampler)))
    assert "Dataset`, each as 5 views" in shown


def test_a_second_accountant_with_more_epsilon_is_a_fault(report):
    def shown(epsilon):
        privacy = replace(report.privacy, epsilon=1.0, cross_check=CrossCheck("dp-accounting 0.6", epsilon, None))
        return as_markdown(replace(report, privacy=privacy))

    assert "report this as a fault" in shown(1.02)
    assert "report this as a fault" not in shown(1.005)


def test_markdown_of_what_is_missing(report):
    check = CrossCheck(None, None, "dp-accounting is not installed")
    privacy = replace(report.privacy, cross_check=check, groups=(GroupPrivacy(8, None, "group privacy"),))
    text = as_markdown(replace(report, privacy=privacy, watched=Watched()))
    for expected in (
        "not asked: dp-accounting is not installed",
        "no useful bound",
        "No training step",
        "None was kept",
    ):
        assert expected in text
    assert "figure" not in text
    assert "pip install 'lightning-dp[plot]'" in as_markdown(report, None)
    assert "(my_report.png)" in as_markdown(report, "my_report")


def test_tables_survive_the_names_of_users(report):
    (row,) = [line for line in as_markdown(report).splitlines() if "My" in line]
    assert row == r"| training data | N = 20 examples of a `My\|Dataset` |"


def test_the_figure_shows_the_history(report):
    epsilon, metrics, share = draw(report).axes
    spent, target = epsilon.lines
    assert (list(spent.get_xdata()), list(spent.get_ydata())) == ([0, 2, 4], [0.0, 1.5, 2.0])
    assert set(target.get_ydata()) == {3.0}
    assert {line.get_label(): list(line.get_ydata()) for line in metrics.lines} == {
        "val_loss": [0.5],
        "val_accuracy": [],
    }
    assert list(share.lines[0].get_ydata()) == [0.25, 0.75]
    assert len(draw(replace(report, watched=Watched())).axes) == 1


def test_data_sets_without_a_common_unit_cost_the_greatest_of_their_epsilons():
    prv = resolve_accountant("prv")
    counts = {Release(1.0, 0.25, partition="a"): 4, Release(1.0, 0.25, partition="b"): 2}
    report = make_report(RECORD, counts, prv)
    alone = make_report(RECORD, {Release(1.0, 0.25): 4}, prv)
    assert report.privacy.epsilon == alone.privacy.epsilon
    assert report.privacy.cross_check == alone.privacy.cross_check
    assert report.privacy.num_releases == 6
    one_person = make_report(RECORD, {Release(1.0, 0.25): 6}, prv)
    assert report.privacy.groups == one_person.privacy.groups  # whose examples may lie in both


def test_users_have_no_groups():
    record = replace(
        RECORD,
        mechanism=replace(RECORD.mechanism, unit="user"),
        sampler=replace(RECORD.sampler, num_units=10),
    )
    report = make_report(record, {Release(1.0, 0.25, 10, "user"): 4}, resolve_accountant("rdp"))
    assert report.privacy.groups == ()
    assert "adding or removing one user" in report.privacy.claim
    assert "one example" not in report.privacy.claim
    text = as_markdown(report)
    for expected in (
        "removing one user",
        "| holds for | add or remove one user |",
        "10 users, poisson",
        "N = 10 users",
    ):
        assert expected in text
    Draft202012Validator(schema()).validate(json.loads(as_json(report)))


def test_a_target_is_claimed_only_if_it_holds():
    counts, rdp = {Release(1.0, 0.25): 4}, resolve_accountant("rdp")
    kept = replace(RECORD, accounting=replace(RECORD.accounting, target_epsilon=50.0))
    lowered = replace(RECORD, accounting=replace(RECORD.accounting, target_epsilon=0.1))
    assert "The target epsilon 50 and delta hold" in make_report(kept, counts, rdp).privacy.claim
    assert "target" not in make_report(lowered, counts, rdp).privacy.claim
