"""Frozen features and the head on them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import lightning_dp as ldp
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.tuning import FrozenFeatures, LinearHead
from lightning_dp.tuning.features import rescaled
from tests.models import trainer


def pairs(count=23, width=6, classes=3):
    return TensorDataset(torch.randn(count, width), torch.randint(classes, (count,)))


def encoder():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Unflatten(1, (2, 4)))


def test_every_example_has_the_norm_and_its_own_features():
    network, data = encoder(), pairs()
    found = FrozenFeatures(network, data, norm=2.5, batch_size=7)
    network.eval()
    for i, (x, y) in enumerate(data):
        raw = network(x[None]).flatten()
        torch.testing.assert_close(found.features[i], 2.5 * raw / raw.pow(2).sum().sqrt())
        assert found.labels[i] == y
    assert found.features.shape == (23, 8)
    assert not found.features.requires_grad


def test_the_encoder_is_left_as_it_was():
    network = encoder()
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    FrozenFeatures(network, pairs())
    assert [part.training for part in network] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_rows_without_a_length_are_zero_and_none_overflows():
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3e38, 3e38], [1e-42, 0.0], [3.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0]] * 3 + [[0.5**0.5, 0.5**0.5], [1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(rescaled(rows, 1.0), expected)


def test_an_encoder_that_mixes_examples_is_refused():
    with pytest.raises(PrivacyConfigurationError, match="gives an example other features alone than beside others"):
        FrozenFeatures(lambda x: x - x.mean(0), pairs())


@pytest.mark.parametrize("norm", [0.0, -1.0, float("inf"), float("nan")])
def test_a_norm_that_is_none_is_refused(norm):
    with pytest.raises(PrivacyConfigurationError, match="expected a finite number > 0, the L2 norm"):
        FrozenFeatures(nn.Identity(), pairs(), norm=norm)


def test_a_batch_is_what_torch_collates():
    found = FrozenFeatures(nn.Identity(), pairs())
    (batch,) = found.dataloader()
    expected = default_collate([found[i] for i in range(len(found))])
    assert [torch.equal(a, b) for a, b in zip(batch, expected, strict=True)] == [True, True]
    loader = found.dataloader()
    again = loader.collate_fn([found[3], found[4]])
    assert torch.equal(again[0], found.features[3:5])


def test_the_head_takes_full_batch_steps_of_sgd_with_momentum():
    data = FrozenFeatures(nn.Identity(), pairs(40), norm=0.5)
    head = LinearHead(6, 3, lr=0.7)
    strategy = ldp.DPStrategy(noise_multiplier=1e-9)  # norms are below max_grad_norm=1, so nothing is clipped
    fit = trainer(strategy, max_steps=5)
    fit.fit(head, data.dataloader())
    weight, velocity = torch.zeros(3, 6), torch.zeros(3, 6)
    targets = nn.functional.one_hot(data.labels, 3).float()
    for _ in range(5):
        gradient = (torch.softmax(data.features @ weight.T, 1) - targets).T @ data.features / 40
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.7 * velocity
    torch.testing.assert_close(head.head.weight.detach(), weight, rtol=1e-4, atol=1e-6)
    assert strategy.sample_rate == 1
    (accuracies,) = fit.validate(head, DataLoader(data, batch_size=9), verbose=False)
    correct = ((data.features @ weight.T).argmax(1) == data.labels).float().mean()
    assert accuracies["val_accuracy"] == pytest.approx(float(correct), abs=0.03)
    (tested,) = fit.test(head, data.dataloader(), verbose=False)
    assert tested["test_accuracy"] == pytest.approx(accuracies["val_accuracy"])


def test_users_can_be_protected_with_all_their_features():
    data = FrozenFeatures(nn.Identity(), pairs(40))
    users = ldp.PrivateDataset(data, user_ids=[i // 4 for i in range(40)], examples_per_user=4)
    loader = DataLoader(users, batch_size=40, collate_fn=data.dataloader().collate_fn)
    strategy = ldp.DPStrategy(noise_multiplier=3.0, target_delta=1e-3)
    fit = trainer(strategy, max_steps=2)
    fit.fit(LinearHead(6, 3), loader)
    assert (strategy.sample_rate, strategy.unit, strategy.num_releases) == (1.0, "user", 2)
