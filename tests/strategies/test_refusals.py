"""Every input that cannot be trained privately gets an error before any training, which names the fix."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

import lightning_dp as ldp
from lightning_dp.strategies.checks import check_trainer
from tests.models import Regression, loader, trainer

CONFIGURATION = ldp.PrivacyConfigurationError


def refused(match, module=None, data=None, error=CONFIGURATION, strategy=None, **settings):
    dp = ldp.DPStrategy(**(strategy or {"noise_multiplier": 1.0}))
    module = module or Regression()
    before = {n: p.clone() for n, p in module.state_dict().items()}
    with pytest.raises(error, match=match):
        trainer(dp, **settings).fit(module, loader() if data is None else data)
    assert dp.num_releases == 0
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    assert all(type(p) is nn.Parameter for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "neither target_epsilon nor noise_multiplier"),
        ({"target_epsilon": 0.0}, "target_epsilon=0.0: expected a positive"),
        ({"target_epsilon": -1}, "target_epsilon=-1: expected a positive"),
        ({"target_epsilon": float("nan")}, "target_epsilon=nan"),
        ({"target_epsilon": "3"}, "target_epsilon='3'"),
        ({"target_epsilon": 1, "target_delta": 0}, "target_delta=0: expected a number between 0 and 1"),
        ({"target_epsilon": 1, "target_delta": 1.0}, "target_delta=1.0: expected"),
        ({"target_epsilon": 1, "target_delta": 2.0}, "target_delta=2.0: expected"),
        ({"noise_multiplier": -0.1}, "noise_multiplier=-0.1: expected a number of at least 0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier=inf"),
        ({"noise_multiplier": 0, "target_epsilon": 1.0}, "without noise epsilon is infinite"),
        ({"noise_multiplier": 1, "max_grad_norm": 0}, "max_grad_norm=0: expected a positive"),
        ({"noise_multiplier": 1, "max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        (
            {"noise_multiplier": 1, "clipping": "ghost"},
            r"clipping='ghost': expected one of \['adaptive', 'automatic', 'flat', 'per_layer', 'psac'\], or",
        ),
        ({"noise_multiplier": 1, "max_physical_batch_size": 0}, "max_physical_batch_size=0: expected a positive int"),
        ({"noise_multiplier": 1, "max_physical_batch_size": 2.5}, "max_physical_batch_size=2.5"),
        ({"noise_multiplier": 1, "accountant": "moments"}, "moments"),
        ({"noise_multiplier": 1, "clipping_engine": "ghost"}, "clipping_engine='ghost': expected 'book' or 'loop'"),
        ({"noise_multiplier": 1, "loss_reduction": "none"}, "loss_reduction='none': expected 'mean' or 'sum'"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(CONFIGURATION, match=match):
        ldp.DPStrategy(**arguments)


def test_the_configuration_error_is_a_value_error_and_a_privacy_error():
    assert issubclass(CONFIGURATION, ValueError)
    assert issubclass(CONFIGURATION, ldp.PrivacyError)
    assert issubclass(ldp.PrivacyError, RuntimeError)
    assert issubclass(ldp.UnsupportedModelError, ldp.PrivacyError)
    assert issubclass(ldp.PrivacyBudgetExceeded, ldp.PrivacyError)


def test_delta_of_one_over_n_or_more():
    settings = {"noise_multiplier": 1.0, "target_delta": 0.05}
    refused(r"target_delta=0.05 with N=20 .*less than 1/N = 0.05.*Try 0.005", strategy=settings)


def test_a_budget_too_small_for_one_step_says_what_would_do():
    settings = {"noise_multiplier": 0.5, "target_epsilon": 0.1}
    refused(
        r"too small for a single step with noise_multiplier=0.5 .*Use noise_multiplier=\d.*at least", strategy=settings
    )


def test_calibration_without_a_planned_end():
    settings = {"target_epsilon": 1.0}
    refused("max_epochs=-1 and max_steps=-1", strategy=settings, max_epochs=-1, max_steps=-1)


def test_a_batch_larger_than_the_dataset():
    refused("batch_size=30 .*N=20 .*at most 20", data=loader(batch_size=30))


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3), torch.zeros(2)


def sampled(sampler):
    data = loader().dataset
    return DataLoader(data, batch_size=5, sampler=sampler(data))


def weighted(_):
    return WeightedRandomSampler([1.0] * 20, 20)


def part(_):
    return SubsetRandomSampler(range(10))


class Pairs(BatchSampler):
    pass


class Repeats(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=5), "IterableDataset"),
        (lambda: sampled(weighted), "sampler=WeightedRandomSampler .*Poisson sampling only"),
        (lambda: sampled(part), "sampler=SubsetRandomSampler"),
        (lambda: DataLoader(loader().dataset, batch_sampler=Pairs(range(20), 5, False)), "batch_sampler=Pairs"),
        (lambda: DataLoader(loader().dataset, batch_size=None), "batch_size=None"),
        (lambda: Repeats(loader().dataset, batch_size=5), "Repeats, which iterates in its own way"),
        (lambda: [loader(), loader()], "expected one DataLoader"),
        (lambda: {"a": loader()}, "expected one DataLoader"),
        (lambda: [(torch.zeros(5, 3), torch.zeros(5, 2))], "expected"),
    ],
)
def test_dataloaders(data, match):
    refused(match, data=data())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2.*max_physical_batch_size"),
        ({"overfit_batches": 2}, "overfit_batches is set"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder.*public data"),
    ],
)
def test_trainer_settings(settings, match):
    refused(match, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"precision": "16-mixed"}, "precision='16-mixed'.*bf16-mixed"),
        ({"precision": "16-true"}, "precision='16-true'"),
    ],
)
def test_trainer_settings_that_need_a_gpu(settings, match):
    fit = SimpleNamespace(**{"accumulate_grad_batches": 1, "precision": "32-true", **settings})
    with pytest.raises(CONFIGURATION, match=match):
        check_trainer(fit)


@pytest.mark.parametrize(
    ("method", "match"),
    [("lr_find", "LearningRateFinder trains on private data"), ("scale_batch_size", "not supported")],
)
def test_tuners(method, match):
    module, dp = Regression(), ldp.DPStrategy(noise_multiplier=1.0)
    module.batch_size, module.train_dataloader = 5, loader
    with pytest.raises(ValueError, match=match):
        getattr(Tuner(trainer(dp)), method)(module)
    assert dp.num_releases == 0


def test_lbfgs():
    refused("LBFGS evaluates the loss several times", module=Regression(optimizer=torch.optim.LBFGS))


def test_no_trainable_parameter():
    module = Regression()
    module.net.requires_grad_(False)
    refused("no trainable parameter", module=module)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm1d(3, track_running_stats=False).eval(),
        nn.SyncBatchNorm(3),
    ],
)
def test_batch_normalisation(layer):
    module = Regression(nn.Sequential(layer, nn.Linear(3, 2)))
    refused("layer 'net.0' is a .*BatchNorm.*GroupNorm", module=module, error=ldp.UnsupportedModelError)


def test_instance_normalisation_with_running_statistics():
    module = Regression(nn.Sequential(nn.Linear(3, 2), nn.InstanceNorm1d(3, track_running_stats=True)))
    refused("layer 'net.1' is a InstanceNorm1d", module=module, error=ldp.UnsupportedModelError)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_frozen_batch_normalisation_is_trained_around():
    module = Regression(nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 2)))
    trainer(ldp.DPStrategy(noise_multiplier=1.0)).fit(module, loader())


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_batch_normalisation_switched_on_later():
    class Later(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].train(batch_idx == 1)

    module = Later(nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 2)))
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.UnsupportedModelError, match=r"net\.0"):
        trainer(dp).fit(module, loader())
    assert dp.num_releases == 1


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda x: x.square().mean(1), r"loss with shape \(.,\)"),
        (lambda x: x.square().mean().item(), "loss with float"),
        (lambda x: (x > 0).sum(), "torch.int64"),
    ],
)
def test_losses_that_are_no_scalar(loss, match):
    class Vector(Regression):
        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]))

    refused(match, module=Vector())


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight

    @staticmethod
    def backward(ctx, g):
        return g, g.sum(0)


def test_a_custom_function_is_named_with_its_parameter_and_line():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(Double.apply(x, self.scale))

    refused(
        r"'net.scale' enters Double \(.*test_refusals.py:\d+\).*clipping_engine='loop'",
        module=Regression(Opaque()),
        error=ldp.UnsupportedModelError,
    )


@pytest.mark.parametrize("engine", ["book", "loop"])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_on_parameters(engine, hook):
    module = Regression()
    getattr(module.net.weight, hook)(lambda *_: None)
    settings = {"noise_multiplier": 1.0, "clipping_engine": engine}
    refused("'net.weight' has a gradient hook", module=module, error=ldp.UnsupportedModelError, strategy=settings)


def test_a_training_step_that_writes_into_a_parameter():
    class Writes(Regression):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3), requires_grad=False)

        def training_step(self, batch, batch_idx):
            self.shift.data.copy_(batch[0].mean(0))
            return super().training_step(batch, batch_idx)

    dp = ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ldp.UnsupportedModelError, match=r"\(d\).*writes into 'shift', a buffer or parameter"):
        trainer(dp).fit(Writes(), loader())
    assert dp.num_releases == 0


def test_samples_that_influence_each_other_are_refused():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    refused("for another sample of the batch", module=Regression(Centred(3, 2)), error=ldp.UnsupportedModelError)


def test_a_collate_function_that_sorts():
    def collate(samples):
        return default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))

    data = loader(collate_fn=collate)
    refused("orders the samples of a batch by itself", data=data, error=ldp.UnsupportedModelError)
