"""What a Lightning user expects of any strategy, and that nothing is left behind."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torchmetrics import MeanMetric

import lightning_dp as ldp
from lightning_dp.strategies.observing import undisturbed
from tests.models import Regression, loader, trainer


def clean(module):
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert not any(
        hook for m in module.modules() for hook in (m._forward_hooks, m._backward_hooks, m._forward_pre_hooks)
    )
    assert "log" not in module.__dict__
    module.trainer = None
    copy.deepcopy(module)
    pickle.loads(pickle.dumps(module.net))


def test_fit_validate_test_predict():
    fit, module = trainer(num_sanity_val_steps=1), Regression()
    fit.fit(module, loader(), loader(shuffle=False))
    (validated,) = fit.validate(module, loader(shuffle=False), verbose=False)
    (tested,) = fit.test(module, loader(shuffle=False), verbose=False)
    assert validated == tested
    predicted = torch.cat(fit.predict(module, loader(shuffle=False)))
    assert predicted.shape == (20, 2)
    clean(module)


def test_the_registered_name():
    import lightning.pytorch as pl

    with pytest.raises(ldp.PrivacyConfigurationError, match="neither target_epsilon"):
        pl.Trainer(strategy="dp", accelerator="cpu")


def test_counts_are_those_of_an_ordinary_fit():
    seen = Counter()

    class Counts(Regression):
        def configure_optimizers(self):
            seen["estimated"] = int(self.trainer.estimated_stepping_batches)
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=seen["estimated"])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_batch_end(self, *args):
            seen["batches"] += 1

        def on_validation_end(self):
            seen["validations"] += 1

    dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2)
    fit = trainer(dp, max_epochs=3, max_steps=-1, val_check_interval=0.5)
    fit.fit(Counts(), loader(), loader(shuffle=False))
    assert seen == {"estimated": 12, "batches": 12, "validations": 6}
    assert fit.global_step == dp.num_releases == 12


@pytest.mark.parametrize(("limit", "steps"), [(2, 2), (0.5, 2), (1.0, 4)])
def test_limit_train_batches_counts_in_the_plan(limit, steps):
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    trainer(dp, max_epochs=1, max_steps=-1, limit_train_batches=limit).fit(Regression(), loader())
    assert dp.num_releases == steps
    assert 1.99 <= dp.epsilon <= 2.0


def test_reloading_the_dataloader_every_epoch():
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fit = trainer(dp, max_epochs=3, max_steps=-1, reload_dataloaders_every_n_epochs=1)

    class Own(Regression):
        def train_dataloader(self):
            return loader()

    fit.fit(Own())
    assert dp.num_releases == 12
    assert dp.epsilon == ldp.compute_epsilon(noise_multiplier=1.0, sample_rate=0.25, num_steps=12, delta=1 / 200)


def test_callbacks_of_lightning(tmp_path):
    callbacks = [EarlyStopping("val_loss", patience=1), ModelCheckpoint(tmp_path, monitor="val_loss")]
    fit = trainer(max_epochs=3, max_steps=-1, callbacks=callbacks)
    fit.fit(Regression(lr=0.01), loader(), loader(shuffle=False))
    assert fit.checkpoint_callback.best_model_path


def test_nothing_is_left_after_an_error():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ValueError("out of luck")
            return super().training_step(batch, batch_idx)

    module, dp = Fails(), ldp.DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ValueError, match="out of luck"):
        trainer(dp).fit(module, loader())
    assert dp.num_releases == 1
    clean(module)


def test_nothing_is_left_after_an_interrupt():
    class Interrupted(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer().fit(module, loader())
    clean(module)


def test_observing_leaves_metrics_buffers_logs_and_random_numbers():
    class Logs(Regression):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean(loss.detach())
            self.seen += 1
            self.log("train_loss", self.mean, on_epoch=True, on_step=False)
            return loss

    module = Logs()
    with undisturbed(module):
        before = torch.random.get_rng_state()
        module.training_step((torch.zeros(4, 3), torch.ones(4, 2)), 0)
        torch.rand(3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (float(module.seen), module.mean._update_count) == (0, 0)
    dp = ldp.DPStrategy(noise_multiplier=0)
    fit = trainer(dp, max_steps=1)
    fit.fit(module, loader(batch_size=20))
    assert float(module.seen) == 1
    assert "train_loss" in fit.callback_metrics
    clean(module)


def test_parameters_unfrozen_in_the_middle_are_clipped_too():
    class Unfreezes(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
            self.net[0].requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(self.global_step >= 1)

    module = Unfreezes()
    first = module.net[0].weight.clone()
    trainer(ldp.DPStrategy(noise_multiplier=0, max_grad_norm=1e-3), max_steps=2).fit(module, loader(batch_size=20))
    moved = float((module.net[0].weight.detach() - first.detach()).norm())
    assert 0 < moved <= 1e-3


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer(make):
    module = Regression(optimizer=make, lr=0.01)
    trainer().fit(module, loader())
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_workers():
    dp = ldp.DPStrategy(noise_multiplier=1.0, max_physical_batch_size=2)
    trainer(dp, max_epochs=2, max_steps=-1).fit(Regression(), loader(num_workers=2))
    assert dp.num_releases == 8
