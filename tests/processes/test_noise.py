"""The noise of several processes together, against the chi-square distribution; the test rejects other scales.

No seed can be fixed: a bound is exceeded by chance once in 1e9 runs.
"""

import math

import numpy as np
import pytest
from scipy import stats

from tests.processes import fits
from tests.processes.world import run

CHANCE = 1e-9


def has_std(values, std):
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], len(values))
    return low < (np.square(values) / std**2).sum() < high


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_noise_of_all_processes_together_is_that_of_one(size):
    found = run(size, fits.noise, size)
    together = np.array(found[0]["together"])
    assert len(together) == fits.WIDTH
    assert all(one["together"] == found[0]["together"] for one in found), "parameters are not bitwise equal"
    assert has_std(together, fits.NOISE)
    if size == 1:
        return
    assert not has_std(np.array(found[0]["once in each process"]), fits.NOISE)
    assert not has_std(np.array(found[0]["too little"]), fits.NOISE)
    own = np.array([one["own"] for one in found])
    assert all(has_std(each, fits.NOISE / math.sqrt(size)) for each in own)
    most = stats.norm.isf(CHANCE / 2) / math.sqrt(fits.WIDTH)
    correlations = np.corrcoef(own)[np.triu_indices(size, 1)]
    assert np.abs(correlations).max() < most
    np.testing.assert_allclose(-own.sum(0), together, rtol=1e-4, atol=1e-4)  # a step of rate 1, downwards
