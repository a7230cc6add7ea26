"""Dataclasses as plain values and back."""

import json
import math
from dataclasses import dataclass

import pytest

import lightning_dp as ldp
from lightning_dp.plain import from_plain, to_plain
from lightning_dp.record import Point, Watched


@dataclass(frozen=True)
class Inner:
    share: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool
    inner: Inner | None
    by_name: dict[str, float | None]
    version: int = 1


FULL = Outer(3, True, Inner(math.inf, ("a", "b")), {"x": 1.5, "y": None})


def test_there_and_back_through_json():
    assert from_plain(Outer, json.loads(json.dumps(to_plain(FULL), allow_nan=False))) == FULL
    watched = Watched((Point("end", 1, 1, math.inf, {"loss": 2.0}),), ("a",))
    assert from_plain(Watched, to_plain(watched)) == watched


def test_whole_numbers_are_numbers_and_what_has_a_default_may_be_missing():
    assert from_plain(Inner, {"share": 1}) == Inner(1.0)
    assert to_plain(float("nan")) is None


def test_another_version():
    with pytest.raises(ldp.PrivacyError, match="the record is of version 2; this library reads version 1"):
        from_plain(Outer, {**to_plain(FULL), "version": 2}, "the record")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "the record, count is malformed: '3', expected int"),
        ({"count": True}, "the record, count is malformed: True, expected int"),
        ({"flag": 1}, "the record, flag is malformed: 1, expected bool"),
        ({"inner": []}, "the record, inner is malformed: .*, expected a mapping"),
        ({"inner": {}}, r"the record, inner is malformed: .*, expected the names \['names', 'share'\]"),
        ({"inner": {"share": 1.0, "names": "ab"}}, "the record, inner, names is malformed"),
        ({"more": 1}, r"the record is malformed: \['by_name', 'count', 'flag', 'inner', 'more', 'version'\], expected"),
        ({"by_name": {"x": "y" * 200}}, "yyy[.]{3}, expected float. Was the file changed by hand"),
    ],
)
def test_malformed(change, message):
    with pytest.raises(ldp.PrivacyError, match=message):
        from_plain(Outer, {**to_plain(FULL), **change}, "the record")
