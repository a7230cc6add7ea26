"""The factors, against their definitions, and the bound, on adversarial norms."""

import pytest
import torch

from lightning_dp.clipping import AutomaticClipping, FlatClipping

NORMS = torch.tensor([0.0, 1e-30, 0.5, 1.0, 2.0, 1e30, float("inf"), float("nan")], dtype=torch.float64)


def test_flat():
    expected = [1, 1, 1, 1, 0.5, 1e-30, 0, 0]
    assert FlatClipping(1.0).factor(NORMS).tolist() == pytest.approx(expected)


def test_automatic():
    expected = [100, 100, 1 / 0.51, 1 / 1.01, 1 / 2.01, 1e-30, 0, 0]
    assert AutomaticClipping(1.0).factor(NORMS).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("clipping", [FlatClipping, AutomaticClipping])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_clipped_norm_exceeds_the_sensitivity(clipping, bound, dtype):
    norms = torch.logspace(-20, 20, 2000, dtype=dtype)
    clip = clipping(bound)
    assert clip.sensitivity == bound
    assert float((clip.factor(norms) * norms).max()) <= bound * (1 + 4 * torch.finfo(dtype).eps)
