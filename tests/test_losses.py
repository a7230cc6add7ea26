"""The mean over samples of each sample's mean, against a loop."""

import pytest
import torch
import torch.nn.functional as F

import lightning_dp as ldp


def test_masked_tokens_against_a_loop():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 11, (5, 7), generator=g)
    for i, length in enumerate((7, 3, 1, 5, 0)):
        labels[i, length:] = -100
    each = [F.cross_entropy(x[y != -100], y[y != -100]) for x, y in zip(logits[:4], labels[:4], strict=True)]
    token_loss = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(ldp.per_sample_mean(token_loss, labels != -100), torch.stack(each).sum() / 5)


def test_without_a_mask_and_with_more_axes():
    loss = torch.arange(24.0).reshape(2, 3, 4)
    assert ldp.per_sample_mean(loss) == loss.mean()
    assert ldp.per_sample_mean(loss[:, 0, 0]) == loss[:, 0, 0].mean()


def test_a_masked_position_may_be_infinite():
    loss = torch.tensor([[1.0, float("inf")]], requires_grad=True)
    value = ldp.per_sample_mean(loss, torch.tensor([[True, False]]))
    (gradient,) = torch.autograd.grad(value, loss)
    assert (value, gradient.tolist()) == (1.0, [[1.0, 0.0]])


def test_errors():
    with pytest.raises(ValueError, match="scalar loss"):
        ldp.per_sample_mean(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and a mask of \(2,\)"):
        ldp.per_sample_mean(torch.zeros(2, 3), torch.ones(2))
