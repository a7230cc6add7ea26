"""Settings of the Trainer and precisions: the fit equals one by hand, and nothing of it is left."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_dp as ldp
from tests.models import loader, parameters, trainer
from tests.strategies.reference import (
    Regression,
    assert_equal,
    assert_fit_is_right,
    by_hand,
    network,
    private_fit,
    whole,
)

# --- settings of the Trainer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"inference_mode": False},
        {"limit_train_batches": 1.0},
        {"limit_train_batches": 1},
        {"val_check_interval": 1.0},
        {"check_val_every_n_epoch": 2},
        {"log_every_n_steps": 1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"barebones": True, "validate": None},
        {"fast_dev_run": True, "steps": 1},
        {"enable_progress_bar": True},
        {"enable_model_summary": True},
        {"gradient_clip_val": None},
        {"max_steps": -1, "max_epochs": 3},
        {"max_steps": 3, "min_epochs": 2},
        {"use_distributed_sampler": False},
        {"num_sanity_val_steps": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*lr scheduler", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_settings_of_the_trainer(settings):
    settings = {"validate": whole(shuffle=False), **settings}
    assert_fit_is_right(Regression(network()), **settings)


def test_deterministic_algorithms():
    try:
        assert_fit_is_right(Regression(network()), deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_fitting_twice_goes_on():
    module = Regression(network())
    expected = by_hand(module, whole(), steps=5)
    fit = private_fit(module, whole(), steps=2)
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(module, whole())
    assert_equal(module, expected)


@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradient_clipping_of_the_trainer_acts_on_what_was_released(how):
    class Notes(Regression):
        released, norms = 0.02, ()

        def configure_gradient_clipping(self, optimizer, *args, **kwargs):
            before = nn.utils.get_total_norm([p.grad for p in self.parameters()])
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            self.norms = (*self.norms, (float(before), [p.grad.clone() for p in self.parameters()]))

    module = Notes(network())
    private_fit(module, whole(), gradient_clip_val=0.02, gradient_clip_algorithm=how)
    for before, gradients in module.norms:
        assert before > 0.02
        if how == "norm":
            assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(0.02, rel=1e-4)
        else:
            assert max(float(g.abs().max()) for g in gradients) == 0.02


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "given", "tolerance"),
    [
        ("64-true", torch.float32, 1e-12),
        (64, torch.float64, 1e-12),
        ("32-true", torch.float32, 2e-6),
        ("bf16-mixed", torch.float32, 1e-2),
        ("bf16-true", torch.float32, 3e-2),
    ],
)
def test_precision(precision, given, tolerance):
    module, data = Regression(network(given), lr=0.1), loader(n=12, batch_size=12, dtype=given)
    in_double = loader(n=12, batch_size=12)
    in_double.dataset.tensors = tuple(t.double() for t in data.dataset.tensors)
    expected = by_hand(copy.deepcopy(module).double(), in_double)
    private_fit(module, data, precision=precision)
    assert_equal(module, expected, tolerance)
    kept = {"64-true": torch.float64, 64: torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {p.dtype for p in module.parameters()} == {kept}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true", "64-true"])
def test_a_large_gradient_is_bounded_in_every_precision(precision):
    """What is summed is what the norm was taken of, so the bound does not suffer from 16 bits."""
    data = loader(n=1, batch_size=1)
    data.dataset.tensors = tuple(100 * t for t in data.dataset.tensors)
    module = Regression(network(torch.float32))
    private_fit(module, data, steps=1, precision=precision, strategy={"target_delta": 0.1, "max_grad_norm": 0.5})
    released = torch.stack([p.grad.double().norm() for p in module.parameters()]).norm()
    assert 0.49 <= float(released) <= 0.5 * (1 + (2**-8 if precision == "bf16-true" else 1e-6))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_noise_has_its_scale_in_16_bits(precision):
    module = Regression(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 20_000, bias=False), nn.Linear(20_000, 2)))
    dp = ldp.DPStrategy(noise_multiplier=2.0)
    trainer(dp, max_steps=1, precision=precision).fit(module, loader())
    noise = module.net[1].weight.grad.double()
    assert float(noise.std()) == pytest.approx(2.0 / 5, rel=0.02)


# --- what is left ---------------------------------------------------------------------------------------------------


class Breaks(Regression):
    """Raises, once, in the middle of a logical batch."""

    def __init__(self, net):
        super().__init__(net)
        self.error = None

    def training_step(self, batch, batch_idx):
        if self.global_step == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().training_step(batch, batch_idx)


def traces(module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return (
        list(module.state_dict()),
        [type(p) for p in module.parameters()],
        [sorted(vars(p)) for p in module.parameters()],
        [sorted(vars(m)) for m in module.modules()],
        [len(getattr(m, hook)) for m in module.modules() for hook in hooks],
        [m.training for m in module.modules()],
    )


@pytest.mark.parametrize("engine", ["book", "loop"])
@pytest.mark.parametrize("error", [None, ValueError("out of luck"), KeyboardInterrupt()], ids=str)
def test_nothing_is_left_and_the_next_fit_is_right(error, engine):
    module, strategy = Breaks(network()), {"clipping_engine": engine}
    trainer("auto", max_steps=1).fit(copy.deepcopy(module), whole())
    private_fit(module, whole(), steps=1, strategy=strategy)
    before = traces(module)
    if error is not None:
        module.error = error
        with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
            private_fit(module, whole(), strategy=strategy)
        assert traces(module) == before
    expected = by_hand(Regression(copy.deepcopy(module.net)), whole())
    private_fit(module, whole(), strategy=strategy)
    assert_equal(module, expected)
    assert traces(module) == before
    module.trainer = None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal(twin, parameters(module))


@pytest.mark.parametrize("engine", ["book", "loop"])
def test_an_error_inside_a_backward_pass_leaves_no_gradient(engine):
    """Those that autograd has written by then have no noise."""

    def fail(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: 1 / 0 if len(steps) == 2 else None)

    steps, module = [], Regression(network())
    module.on_train_batch_start = lambda batch, batch_idx: steps.append(batch_idx)
    module.net[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        private_fit(module, whole(), strategy={"clipping_engine": engine})
    assert len(steps) == 2
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("reparametrize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_function_of_parameters_that_the_model_keeps_is_an_ordinary_tensor_afterwards(reparametrize):
    """These keep the weight that they compute before every forward pass as an attribute."""

    def build():
        net = network()
        net[0] = reparametrize(net[0])
        return Regression(net)

    module, expected = build(), by_hand(build(), whole(), on_a_copy=False)
    private_fit(module, whole())
    if reparametrize is nn.utils.weight_norm:  # the other one improves its estimate in every forward pass
        assert_equal(module, expected)
    assert type(module.net[0].weight) is torch.Tensor
    assert type(pickle.loads(pickle.dumps(module.net))[0].weight) is torch.Tensor


def test_an_ordinary_fit_leaves_the_same_attributes():
    plain, module = Regression(network()), Regression(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(plain, whole())
    private_fit(module, whole(), steps=1)
    assert traces(module) == traces(plain)
