"""torch.compile: what was compiled runs as it was written in private steps, exactly, and compiled everywhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from tests.strategies.reference import (
    Regression,
    assert_equal,
    assert_fit_is_right,
    by_hand,
    network,
    private_fit,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CompiledLoss(Regression):
    """The network and the loss are one compiled function of the training step."""

    def __init__(self, net, backend):
        super().__init__(net)
        self.loss = torch.compile(lambda x, y: F.mse_loss(self.net(x), y), backend=backend, fullgraph=True)

    def __deepcopy__(self, memo):
        copy = Regression(network())
        copy.load_state_dict(self.state_dict())
        return copy

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)


def compiled(way, backend):
    """Return a module and what is given to ``fit``."""
    if way == "function of the training step":
        module = CompiledLoss(network(), backend)
        return module, module
    module = Regression(network())
    if way == "submodule":
        module.net = torch.compile(module.net, backend=backend)
    if way == "submodule in place":
        module.net.compile(backend=backend)
    if way == "one layer, full graph":
        module.net[3] = torch.compile(module.net[3], backend=backend, fullgraph=True)
    return module, torch.compile(module, backend=backend) if way == "whole module" else module


WAYS = ["submodule", "submodule in place", "one layer, full graph", "function of the training step", "whole module"]


@pytest.mark.parametrize("way", WAYS)
def test_private_steps_are_exact_and_compile_nothing(way):
    expected, counter = by_hand(Regression(network()), whole()), CompileCounter()
    module, target = compiled(way, counter)
    private_fit(module, whole(), target=target)
    assert_equal(module, expected)
    assert counter.frame_count == 0
    assert all(type(p) is nn.Parameter for p in module.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_one_sample_at_a_time_runs_compiled_and_is_exact(way):
    expected, counter = by_hand(Regression(network()), whole()), CompileCounter()
    module, target = compiled(way, counter)
    private_fit(module, whole(), target=target, strategy={"clipping_engine": "loop"})
    assert_equal(module, expected)
    # One shape, one graph, for all samples of all steps. (torch 2.6 compiles nothing that was compiled in place here.)
    assert counter.frame_count in ((0, 1) if way == "submodule in place" else (1,))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["book", "loop"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", WAYS)
def test_every_backend(way, backend, engine):
    expected = by_hand(Regression(network()), whole())
    module, target = compiled(way, backend)
    private_fit(module, whole(), target=target, strategy={"clipping_engine": engine})
    assert_equal(module, expected)


def test_validation_runs_compiled_once_and_not_again_after_private_steps():
    counter = CompileCounter()
    module, _ = compiled("submodule", counter)
    data = whole()
    expected = by_hand(Regression(network()), data)
    fit = private_fit(module, data, validate=whole(shuffle=False), check_val_every_n_epoch=1, num_sanity_val_steps=1)
    assert_equal(module, expected)
    assert "val_loss" in fit.callback_metrics
    assert counter.frame_count == 1


def test_compiled_dropout_passes_the_self_check():
    """A compiled function may draw other random numbers than the same function uncompiled."""
    module = Regression(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double())
    module.net = torch.compile(module.net, backend=CompileCounter())
    private_fit(module, whole())


def test_the_users_own_stance_is_put_back():
    counter = CompileCounter()
    module, _ = compiled("submodule", counter)
    private_fit(module, whole(), steps=1)
    module.net(torch.zeros(1, 3, dtype=torch.float64))
    assert counter.frame_count == 1


class Attention(nn.Module):
    """FlexAttention is an operator that takes functions, and compiles itself."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(1, 48), nn.Linear(48, 2)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (1, 16)).transpose(1, 2) for t in self.into(x[..., None]).chunk(3, -1))
        attended = flex.flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + 0.1 * (i - j))
        return self.out(attended.transpose(1, 2).flatten(1))


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="torch cannot observe such operators"
)
def test_flex_attention(monkeypatch):
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # it has no backward pass on a CPU but this one
    assert_fit_is_right(Regression(Attention().double()))
