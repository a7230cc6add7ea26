"""Phases and the checks of their values."""

import json
import math

import numpy as np
import pytest

from lightning_dp.accounting import Phase, merge_phases
from lightning_dp.errors import PrivacyConfigurationError


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True])
def test_bad_noise_multiplier(value):
    with pytest.raises(PrivacyConfigurationError, match=r"noise_multiplier=.*expected a finite number >= 0"):
        Phase(value, 0.1, 1)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, math.inf, "0.1", None, True])
def test_bad_sample_rate(value):
    with pytest.raises(PrivacyConfigurationError, match=r"sample_rate=.*expected a probability in \(0, 1\]"):
        Phase(1.0, value, 1)


@pytest.mark.parametrize("value", [-1, 1.5, 2.0, math.nan, "3", None, True])
def test_bad_num_releases(value):
    with pytest.raises(PrivacyConfigurationError, match=r"num_releases=.*expected an integer >= 0"):
        Phase(1.0, 0.1, value)


def test_numpy_values_become_plain():
    phase = Phase(np.float32(0.5), np.float64(0.25), np.int64(3))
    assert json.dumps([phase.noise_multiplier, phase.sample_rate, phase.num_releases]) == "[0.5, 0.25, 3]"


def test_merge():
    phases = [Phase(1, 0.1, 2), Phase(2, 0.1, 1), Phase(1.0, 0.1, 3), Phase(3, 0.1, 0)]
    assert merge_phases(phases) == (Phase(1, 0.1, 5), Phase(2, 0.1, 1))
