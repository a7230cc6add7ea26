"""Lightning's own callbacks: what each does to a private fit, by comparison with a fit by hand."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import prune

import lightning_dp as ldp
from tests.models import clipped_mean, loader, parameters, trainer
from tests.strategies.reference import (
    Regression,
    assert_equal,
    assert_fit_is_right,
    by_hand,
    network,
    private_fit,
    whole,
)

EPOCHS = {"max_epochs": 3, "max_steps": -1}  # of one batch each


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
@pytest.mark.parametrize(
    "make",
    [
        lambda: lightning.Timer(duration={"hours": 1}),
        lambda: lightning.ModelSummary(2),
        lambda: lightning.RichModelSummary(),
        pytest.param(
            lightning.RichProgressBar, marks=pytest.mark.skipif(pl.__version__ < "2.6", reason="needs rich 13")
        ),
        lambda: lightning.TQDMProgressBar(),
        lambda: lightning.LambdaCallback(on_train_batch_end=lambda *_: None),
        lambda: lightning.EarlyStopping("val_loss", patience=5),
        lambda: lightning.ModelCheckpoint(".", monitor="val_loss", save_last=True),
        lambda: lightning.LearningRateMonitor(),
        lambda: lightning.DeviceStatsMonitor(cpu_stats=False),
        lambda: lightning.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
        lambda: lightning.GradientAccumulationScheduler({0: 1}),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_callbacks_that_do_not_touch_the_model(make):
    shown = {
        "enable_progress_bar": True,
        "enable_model_summary": True,
        "logger": CSVLogger("."),
        "log_every_n_steps": 1,
    }
    assert_fit_is_right(Regression(network()), callbacks=[make()], validate=whole(shuffle=False), **shown, **EPOCHS)


def test_early_stopping_on_a_validation_metric():
    stop = lightning.EarlyStopping("val_loss", patience=0, min_delta=100.0)
    module, fit = Regression(network()), trainer(max_epochs=9, max_steps=-1, callbacks=[stop])
    fit.fit(module, whole(), whole(shuffle=False))
    assert fit.strategy.num_releases == fit.global_step == 2


def test_the_best_checkpoint_holds_the_weights_of_its_step(tmp_path):
    module, data = Regression(network()), whole()
    kept = lightning.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    start = copy.deepcopy(module)
    private_fit(module, data, validate=whole(shuffle=False), callbacks=[kept], **EPOCHS)
    for step in (1, 2, 3):
        assert_equal(
            Regression.load_from_checkpoint(tmp_path / f"step={step}.ckpt", net=network()), by_hand(start, data, step)
        )


@pytest.mark.filterwarnings("ignore:.*ckpt_path=")
def test_the_checkpoint_of_an_exception_holds_the_ledger(tmp_path):
    class Fails(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 2:
                raise ValueError("out of luck")

    kept = lightning.OnExceptionCheckpoint(tmp_path, filename="failed")
    with pytest.raises(ValueError, match="out of luck"):
        trainer(callbacks=[kept], max_steps=5).fit(Fails(network()), whole())
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    trainer(dp, max_steps=5).fit(Regression(network()), whole(), ckpt_path=tmp_path / "failed.ckpt")
    assert dp.num_releases == 5


def averaged(module, data, steps, average):
    """Return the parameters by hand: ``average`` of those after each step."""
    after = [by_hand(module, data, k) for k in range(steps + 1)]
    return {name: average([row[name] for row in after]) for name in after[0]}


@pytest.mark.skipif(not hasattr(lightning, "WeightAveraging"), reason="came with Lightning 2.6")
def test_averages_of_weights():
    for callback, average in (
        (lambda: lightning.WeightAveraging(), lambda p: torch.stack(p[1:]).mean(0)),
        (lambda: lightning.EMAWeightAveraging(decay=0.25), lambda p: 0.0625 * p[1] + 0.1875 * p[2] + 0.75 * p[3]),
    ):
        module = Regression(network())
        expected = averaged(module, whole(), 3, average)
        private_fit(module, whole(), callbacks=[callback()])
        assert_equal(module, expected)


@pytest.mark.skipif(not hasattr(lightning, "EMAWeightAveraging"), reason="came with Lightning 2.6")
def test_a_moving_average_of_weights_costs_nothing():
    """It is a function of what was released: of the noisy weights after every step, and of nothing else."""
    after = []

    class Notes(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            after.append(parameters(pl_module))

    module, dp = Regression(network(), lr=0.1), ldp.DPStrategy(noise_multiplier=1.5, target_delta=1e-3)
    callbacks = [lightning.EMAWeightAveraging(decay=0.25), Notes()]
    trainer(dp, max_steps=3, callbacks=callbacks).fit(module, loader(dtype=torch.float64))
    first, second, third = after
    assert_equal(module, {name: 0.0625 * p + 0.1875 * second[name] + 0.75 * third[name] for name, p in first.items()})
    assert not torch.equal(module.net[0].weight, third["net.0.weight"])
    spent = ldp.compute_epsilon(noise_multiplier=1.5, sample_rate=0.25, num_steps=3, delta=1e-3)
    assert (dp.num_releases, dp.epsilon) == (3, spent)


def test_stochastic_weight_averaging():
    """Where nothing is clipped and all samples are in the batch, a private fit is an ordinary one."""
    module, plain = Regression(network(), lr=0.3), Regression(network(), lr=0.3)

    def average():
        return {"callbacks": [lightning.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)], **EPOCHS}

    trainer("auto", **average()).fit(plain, whole())
    without = by_hand(module, whole(), max_grad_norm=1e6)
    private_fit(module, whole(), strategy={"max_grad_norm": 1e6}, **average())
    assert_equal(module, parameters(plain))
    assert any(not torch.allclose(p, without[name]) for name, p in parameters(module).items())


class FrozenStatistics(Regression):
    def on_train_epoch_start(self):
        self.net[1].eval()


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_stochastic_weight_averaging_does_not_compute_statistics():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)).double()
    before = net[1].running_mean.clone()
    with pytest.raises(ldp.PrivacyConfigurationError, match=r"StochasticWeightAveraging .*layer 'net.1' .*GroupNorm"):
        private_fit(FrozenStatistics(net), whole(), callbacks=[lightning.StochasticWeightAveraging(0.1)], **EPOCHS)
    private_fit(FrozenStatistics(net), whole(), **EPOCHS)
    assert torch.equal(net[1].running_mean, before)


@pytest.mark.parametrize("scheduling", [{0: 2}, {5: 3}])
def test_a_schedule_of_accumulation_is_refused_at_once(scheduling):
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    callback = lightning.GradientAccumulationScheduler(scheduling)
    with pytest.raises(ldp.PrivacyConfigurationError, match="GradientAccumulationScheduler.*expected accumulate_grad"):
        trainer(dp, callbacks=[callback], max_epochs=9, max_steps=-1).fit(Regression(), loader())
    assert dp.num_releases == 0


class Unfreezing(lightning.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:3])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.5)


class FirstPartFrozen(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def test_parameters_unfrozen_in_the_middle():
    module, data = FirstPartFrozen(network()), whole()
    expected = copy.deepcopy(module)
    expected.net[:3].requires_grad_(False)
    expected.load_state_dict(by_hand(expected, data, 1))
    expected.net[:3].requires_grad_(True)

    def two_rates(m):
        return torch.optim.SGD([{"params": m.net[3].parameters()}, {"params": m.net[:3].parameters(), "lr": 0.5}], lr=1)

    expected = by_hand(expected, data, 2, optimizer=two_rates)
    private_fit(module, data, callbacks=[Unfreezing()], **EPOCHS)
    assert_equal(module, expected)


def test_pruning_by_magnitude():
    """After each epoch half of what is left of each parameter is masked; names of parameters change in the first."""
    module, data = Regression(network()), whole()
    expected, (x, y) = copy.deepcopy(module), data.dataset.tensors
    pruned = [(expected.net[0], "weight"), (expected.net[3], "weight")]
    for _ in range(2):
        stepper = torch.optim.SGD(expected.parameters(), lr=1.0)
        mean = clipped_mean(expected, lambda i: (x[i : i + 1], y[i : i + 1]), len(x))
        for name, p in expected.named_parameters():
            p.grad = mean[name]
        stepper.step()
        for layer, name in pruned:
            prune.l1_unstructured(layer, name, amount=0.5)
    for layer, name in pruned:
        prune.remove(layer, name)
    callback = lightning.ModelPruning(
        "l1_unstructured",
        amount=0.5,
        parameters_to_prune=[(module.net[0], "weight"), (module.net[3], "weight")],
        use_global_unstructured=False,
        use_lottery_ticket_hypothesis=False,
    )
    private_fit(module, data, steps=2, callbacks=[callback], max_epochs=2, max_steps=-1)
    assert_equal(module, parameters(expected))
    assert type(module.net[0].weight) is nn.Parameter
    assert float((module.net[0].weight == 0).double().mean()) == 0.75


class LooksEverywhere(pl.Callback):
    """Notes the gradients that it sees in every hook, and those that the optimizer uses."""

    def __init__(self):
        self.seen, self.used = [], []

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda *_: self.look(pl_module))
        optimizer.register_step_post_hook(lambda *_: self.used.append(self.gradients(pl_module)))

    @staticmethod
    def gradients(pl_module):
        return tuple(None if p.grad is None else p.grad.clone() for p in pl_module.parameters())

    def look(self, pl_module):
        self.seen.append(self.gradients(pl_module))


def _looking(hook):
    def method(self, trainer, pl_module, *args, **kwargs):
        self.look(pl_module)

    method.__name__ = hook
    return method


HOOKS = [hook for hook in vars(pl.Callback) if hook.startswith("on_") and "checkpoint" not in hook]
for _hook in HOOKS:
    if _hook != "on_train_start":
        setattr(LooksEverywhere, _hook, _looking(_hook))


@pytest.mark.parametrize("engine", ["book", "loop"])
def test_no_hook_ever_sees_a_gradient_without_noise(engine):
    callback, module = LooksEverywhere(), Regression(network())
    dp = ldp.DPStrategy(noise_multiplier=1.0, clipping_engine=engine, max_physical_batch_size=5)
    trainer(dp, callbacks=[callback]).fit(module, whole(), whole(shuffle=False))
    assert len(callback.used) == 3
    released = {id(g): g for row in callback.used for g in row}
    for row in callback.seen:
        for g in row:
            assert g is None or any(torch.equal(g, r) for r in released.values() if r.shape == g.shape)
    assert len(callback.seen) > 20
