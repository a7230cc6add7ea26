"""Everything that configure_optimizers may return for automatic optimization: the fit equals one by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler as rates

import lightning_dp as ldp
from tests.strategies.reference import (
    Regression,
    assert_equal,
    assert_fit_is_right,
    by_hand,
    network,
    private_fit,
    whole,
)


class Configured(Regression):
    """A module whose configure_optimizers returns what a test says."""

    def __init__(self, configure):
        super().__init__(network())
        self.configure = configure

    def configure_optimizers(self):
        return self.configure(self)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)


def halved(optimizer):
    return rates.StepLR(optimizer, step_size=1, gamma=0.5)


def with_schedule(form):
    def configure(module):
        optimizer = sgd(module)
        return form(optimizer, halved(optimizer))

    return configure


@pytest.mark.parametrize("form", [sgd, lambda m: [sgd(m)], lambda m: (sgd(m),), lambda m: {"optimizer": sgd(m)}])
def test_forms_without_a_schedule(form):
    assert_fit_is_right(Configured(form), by={"optimizer": sgd})


@pytest.mark.parametrize(
    "form",
    [
        lambda o, s: ([o], [s]),
        lambda o, s: ([o], [{"scheduler": s}]),
        lambda o, s: {"optimizer": o, "lr_scheduler": s},
        lambda o, s: [{"optimizer": o, "lr_scheduler": s}],
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "epoch"}},
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step", "frequency": 1}},
        lambda o, s: ([o], [{"scheduler": s, "interval": "step", "name": "rate"}]),
    ],
)
def test_forms_with_a_schedule(form):
    """An epoch is one batch here, so that schedules by epoch and by step agree."""
    by = {"optimizer": sgd, "schedule": lambda optimizer, module: halved(optimizer).step}
    assert_fit_is_right(Configured(with_schedule(form)), by=by)


@pytest.mark.parametrize(("interval", "expected"), [("step", [0.5, 0.25, 0.125, 0.0625]), ("epoch", [0.5] * 4)])
def test_a_schedule_counts_logical_batches(interval, expected):
    seen = []

    class Notes(Configured):
        def on_before_optimizer_step(self, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    module = Notes(with_schedule(lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": interval}}))
    data = whole()
    data = torch.utils.data.DataLoader(data.dataset, batch_size=3, shuffle=True)
    private_fit(module, data, steps=4, strategy={"max_physical_batch_size": 1})
    assert seen == expected


@pytest.mark.parametrize("outside", [True, False])
def test_a_plateau_of_a_validation_metric(outside):
    def plateau(optimizer):
        return rates.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0, threshold_mode="abs")

    def configure(module):
        optimizer = sgd(module)
        if outside:
            return {"optimizer": optimizer, "lr_scheduler": plateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau(optimizer), "monitor": "val_loss"}}

    x, y = whole().dataset.tensors

    def by_loss(optimizer, module):
        schedule = plateau(optimizer)
        return lambda: schedule.step(F.mse_loss(module.net(x), y).detach())

    fit = assert_fit_is_right(
        Configured(configure), by={"optimizer": sgd, "schedule": by_loss}, validate=whole(shuffle=False), steps=4
    )
    assert fit.optimizers[0].param_groups[0]["lr"] < 0.1


def grouped(module):
    return torch.optim.SGD(
        [
            {"params": module.net[0].parameters(), "lr": 0.1},
            {"params": [module.net[3].weight], "lr": 1.0, "weight_decay": 0.1},
            {"params": [module.net[3].bias]},
        ],
        lr=0.5,
    )


def test_parameter_groups_and_parameters_left_out():
    """What no group holds is not trained, and does not count in the norms."""
    expected = Configured(grouped)
    expected.net[2].requires_grad_(False)
    expected = by_hand(expected, whole())
    module = Configured(grouped)
    private_fit(module, whole())
    assert_equal(module, expected)
    assert all(p.grad is None for p in module.net[2].parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.RAdam(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Rprop(p, lr=0.1),
        lambda p: torch.optim.ASGD(p, lr=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ],
)
def test_optimizers(make):
    assert_fit_is_right(Configured(lambda m: make(m.parameters())), tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer():
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"no trainable parameter.*from configure_optimizers\(\)"):
        private_fit(Configured(lambda m: None), whole())


def test_an_optimizer_made_anew_in_a_second_fit():
    made = []
    module = Configured(lambda m: made.append(sgd(m)) or made[-1])
    expected = by_hand(module, whole(), steps=2, optimizer=sgd)
    private_fit(module, whole(), steps=2)
    assert_equal(module, expected)
    expected = by_hand(module, whole(), steps=2, optimizer=sgd)
    private_fit(module, whole(), steps=2)
    assert_equal(module, expected)
    assert len(made) == 2
