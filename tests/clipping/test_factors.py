"""The factors, against their definitions, and the bound, on adversarial norms; and what is refused."""

import pytest
import torch

import lightning_dp as ldp
from lightning_dp.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    NormClipping,
    Part,
    PerLayerClipping,
    PSACClipping,
    checked_parts,
    resolve_clipping,
)

NORMS = torch.tensor([0.0, 1e-30, 0.5, 1.0, 2.0, 1e30, float("inf"), float("nan")], dtype=torch.float64)


def test_flat():
    expected = [1, 1, 1, 1, 0.5, 1e-30, 0, 0]
    assert FlatClipping(1.0).factor(NORMS).tolist() == pytest.approx(expected)
    assert AdaptiveClipping(1.0).factor(NORMS).tolist() == pytest.approx(expected)


def test_automatic():
    expected = [100, 100, 1 / 0.51, 1 / 1.01, 1 / 2.01, 1e-30, 0, 0]
    assert AutomaticClipping(1.0).factor(NORMS).tolist() == pytest.approx(expected)


def test_per_sample_adaptive():
    expected = [1, 1, 1 / (0.5 + 0.25 / 0.75), 1 / (1 + 0.25 / 1.25), 1 / (2 + 0.25 / 2.25), 1e-30, 0, 0]
    assert PSACClipping(1.0, r=0.25).factor(NORMS).tolist() == pytest.approx(expected)
    assert PSACClipping(3.0, r=0.25).factor(NORMS).tolist() == pytest.approx([3 * factor for factor in expected])
    around = torch.linspace(0.15, 0.35, 2001, dtype=torch.float64)
    assert float(around[PSACClipping(1.0, r=0.25).factor(around).argmax()]) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("clipping", [FlatClipping, AutomaticClipping, PSACClipping, AdaptiveClipping])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_clipped_norm_exceeds_the_sensitivity(clipping, bound, dtype):
    norms = torch.logspace(-20, 20, 2000, dtype=dtype)
    clip = clipping(bound)
    assert clip.sensitivity == bound
    assert float((clip.factor(norms) * norms).max()) <= bound * (1 + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [
        ("flat", FlatClipping, "flat"),
        ("automatic", AutomaticClipping, "automatic"),
        ("psac", PSACClipping, "psac (r 0.1)"),
        ("per_layer", PerLayerClipping, "per_layer (equal bounds)"),
        ("adaptive", AdaptiveClipping, "adaptive (quantile 0.5, learning rate 0.2)"),
    ],
)
def test_names(name, kind, shown):
    assert type(resolve_clipping(name)) is kind
    assert (resolve_clipping(name).max_grad_norm, resolve_clipping(name, 2.0).max_grad_norm) == (1.0, 2.0)
    assert str(resolve_clipping(name)) == shown


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlatClipping(0), "max_grad_norm=0: expected a positive number, the largest norm"),
        (lambda: FlatClipping(float("inf")), "max_grad_norm=inf: expected a positive number"),
        (lambda: FlatClipping(True), "max_grad_norm=True: expected a positive number"),
        (lambda: PSACClipping(r=0), "r=0: expected a positive number"),
        (lambda: PerLayerClipping(budgets="some"), r"budgets='some': expected one of \['equal', 'size'\]"),
        (lambda: PerLayerClipping(groups=["head"]), r"groups=\['head'\]: expected names of groups"),
        (lambda: PerLayerClipping(groups={"a": "head"}), "groups: 'a' has 'head', expected a list"),
        (lambda: PerLayerClipping(groups={"a": []}), r"groups: 'a' has \[\], expected a list"),
        (lambda: AdaptiveClipping(quantile=1.5), "quantile=1.5: expected a number from 0 to 1"),
        (lambda: AdaptiveClipping(quantile=True), "quantile=True: expected a number from 0 to 1"),
        (lambda: AdaptiveClipping(learning_rate=0), "learning_rate=0: expected a positive number"),
        (lambda: AdaptiveClipping(count_noise_std=-1), "count_noise_std=-1: expected a positive number"),
        (lambda: resolve_clipping("other"), r"clipping='other': expected one of .*'psac'.*, or a Clipping"),
        (lambda: resolve_clipping(3), "clipping=3: expected one of .*, or a Clipping such as"),
        (lambda: resolve_clipping(FlatClipping(0.5), 1.0), "max_grad_norm=1.0 beside a FlatClipping with .*=0.5"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ldp.PrivacyConfigurationError, match=message):
        make()


def test_a_clipping_object_keeps_its_bound():
    assert resolve_clipping(FlatClipping(0.5)).max_grad_norm == 0.5
    assert resolve_clipping(FlatClipping(0.5), 0.5).max_grad_norm == 0.5


class Custom(NormClipping):
    """A clipping as users may write it."""

    def __init__(self, factor, sensitivity=1.0):
        super().__init__(sensitivity)
        self._user = factor

    def _factor(self, norm):
        return self._user(norm)


@pytest.mark.parametrize(
    "factor",
    [
        torch.ones_like,  # nothing is clipped
        lambda norm: 1.01 / norm.clamp(min=1),
        lambda norm: -2 / norm.clamp(min=1),
        lambda norm: 1 / norm,  # 0 / 0 for the norm 0
    ],
)
def test_a_clipping_of_a_user_that_exceeds_its_bound_is_refused(factor):
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"clipping=Custom: a gradient of norm .* gets the factor"):
        ldp.DPStrategy(noise_multiplier=1.0, clipping=Custom(factor))


def test_a_clipping_of_a_user_is_taken():
    ldp.DPStrategy(noise_multiplier=1.0, clipping=Custom(lambda norm: 1 / norm.clamp(min=2)))


class Groups(Clipping):
    """Groups as users may make them."""

    def __init__(self, *parts):
        super().__init__(1.0)
        self._given = parts

    def parts(self, sizes):
        return self._given


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part(FlatClipping(0.6), ("a",))], "parameter 'b' is in 0 of its groups, expected one"),
        ([Part(FlatClipping(0.6), ("a", "b")), Part(FlatClipping(0.6), ("b",))], "parameter 'b' is in 2 of its groups"),
        (
            [Part(FlatClipping(0.8), ("a",)), Part(FlatClipping(0.8), ("b",))],
            "add 1.13137 to its groups .* said to be 1",
        ),
        ([Part(Custom(torch.ones_like, 0.6), ("a", "b"))], "clipping=Custom: a gradient of norm"),
    ],
)
def test_groups_of_a_user_that_exceed_their_bound_are_refused(parts, message):
    with pytest.raises(ldp.PrivacyConfigurationError, match=message):
        checked_parts(Groups(*parts), {"a": 3, "b": 4})


def test_groups_of_a_user_are_taken():
    parts = [Part(FlatClipping(0.6), ("a",)), Part(AutomaticClipping(0.8), ("b",))]
    assert checked_parts(Groups(*parts), {"a": 3, "b": 4}) == tuple(parts)
    whole = FlatClipping(2.0)
    assert checked_parts(whole, {"a": 3, "b": 4}) == [Part(whole, ("a", "b"))]
