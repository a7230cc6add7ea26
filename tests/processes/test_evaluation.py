"""Validation, test and prediction on several processes, without a fit and within one."""

import numpy as np
import pytest

from tests.processes import fits
from tests.processes.world import run


def test_every_example_is_seen_once():
    (one,), found = run(1, fits.evaluated, 1), run(2, fits.evaluated, 2)
    for each in found:
        assert each["validate"][0]["val_loss"] == pytest.approx(one["validate"][0]["val_loss"], rel=1e-6)
        assert each["test"][0]["val_loss"] == pytest.approx(one["test"][0]["val_loss"], rel=1e-6)
        assert each["fit"] == pytest.approx(one["fit"], rel=1e-6)
    halves = [sum(each["predictions"], []) for each in found]
    together = [row for pair in zip(*halves, strict=True) for row in pair]  # a DistributedSampler takes turns
    np.testing.assert_allclose(together, sum(one["predictions"], []), rtol=1e-12)
