"""What becomes of an optimizer and its schedule: compared with a twin that goes on, and with one that is new."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from lightning_dp.callbacks.restarting import check_proportional, rescale, restart
from lightning_dp.errors import PrivacyConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR of torch 2.6

PROPORTIONAL = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, [lambda k: 1 / (1 + k), lambda k: 0.5**k]),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.5, 1.0, 5), schedules.CosineAnnealingLR(o, 5)], milestones=[5]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, 5), schedules.ExponentialLR(o, 0.9)]
    ),
}


def made(schedule=None):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return net, optimizer, schedule and schedule(optimizer)


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, schedules.ReduceLROnPlateau))
        found.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == found[-1]
    return found


@pytest.mark.parametrize("kind", PROPORTIONAL)
def test_every_later_rate_is_multiplied(kind):
    (_, twin, goes_on), (_, optimizer, scheduler) = made(PROPORTIONAL[kind]), made(PROPORTIONAL[kind])
    rates(twin, goes_on, 3)
    rates(optimizer, scheduler, 3)
    check_proportional(scheduler, 4.0)
    restart(optimizer, 4.0)
    rescale(scheduler, 4.0)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = [[4 * rate for rate in row] for row in rates(twin, goes_on, 9)]
    assert torch.allclose(torch.tensor(rates(optimizer, scheduler, 9)), torch.tensor(expected), rtol=1e-6)
    assert len({tuple(row) for row in expected}) > 1

    _, resumed, from_state = made(PROPORTIONAL[kind])
    resumed.load_state_dict(saved[0])
    from_state.load_state_dict(saved[1])
    assert torch.allclose(torch.tensor(rates(resumed, from_state, 9)), torch.tensor(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        (lambda o: schedules.CosineAnnealingLR(o, 6, eta_min=0.01), "CosineAnnealingLR"),
        (lambda o: schedules.CosineAnnealingWarmRestarts(o, 6, eta_min=0.01), "CosineAnnealingWarmRestarts"),
        (lambda o: schedules.ReduceLROnPlateau(o, min_lr=[0.0, 0.01]), "ReduceLROnPlateau"),
        (lambda o: schedules.OneCycleLR(o, 0.1, total_steps=9), "OneCycleLR"),
        (lambda o: schedules.CyclicLR(o, 0.1, 0.2), "CyclicLR"),
        (lambda o: schedules.ChainedScheduler([schedules.CyclicLR(o, 0.1, 0.2)]), "CyclicLR"),
        (lambda o: type("Own", (schedules.LambdaLR,), {})(o, lambda k: 1.0), "Own"),
    ],
)
def test_rates_that_a_factor_leaves_unclear(schedule, named):
    with pytest.raises(PrivacyConfigurationError, match=f"learning_rate_factor=4 with the scheduler {named}:"):
        check_proportional(made(schedule)[2], 4.0)


def test_a_restarted_optimizer_is_as_a_new_one():
    net, optimizer, _ = made()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    net[0].requires_grad_(False)
    net[1].weight.requires_grad_(False)
    restart(optimizer, 2.0)
    assert not optimizer.state
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(0, 0.6), (1, 0.2)]
    new = torch.optim.SGD([net[1].bias], lr=0.2, momentum=0.9)
    assert optimizer.param_groups[1]["params"] == new.param_groups[0]["params"]
    optimizer.step()
    assert list(optimizer.state) == [net[1].bias]
