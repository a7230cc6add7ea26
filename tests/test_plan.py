"""A plan: what it says agrees with what can be counted independently, and it leaves nothing behind."""

import os
import random
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

import lightning_dp as ldp
from lightning_dp.bookkeeping.costs import Rates
from lightning_dp.bookkeeping.random_state import RandomState
from lightning_dp.coverage import timing
from lightning_dp.coverage.names import collapsed
from tests.models import Regression, loader, parameters, trainer
from tests.strategies.test_manual import GAN, FeatureMatching, real_samples
from tests.strategies.test_self_check import Opaque
from tests.test_cli import command_line

DIGITS = Path(__file__).parents[1] / "configs" / "digits.yaml"
CSV = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]
CPU = [
    *CSV,
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.strategy.noise_multiplier=1.0",
]


@pytest.fixture(autouse=True)
def _no_command_line_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path):
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_MAX_ROUNDS", 3)


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch):
    """Which way to a norm is the cheapest is measured; here it is the same on every machine."""
    monkeypatch.setattr("lightning_dp.bookkeeping.products.rates_of", lambda t: Rates(products=40e9, elements=1e9))


@pytest.fixture(autouse=True)
def _no_tables_of_the_budget(request, monkeypatch):
    """They take seconds, and have tests of their own."""
    if "with_tables" not in request.fixturenames:
        monkeypatch.setattr("lightning_dp.coverage.table.print_budget", lambda forecast, console: None)


@pytest.fixture
def with_tables():
    """Shows the tables of the budget."""


def planned(module, data=None, callbacks=(), show=False, **settings):
    dp = ldp.DPStrategy(**{"noise_multiplier": 1.0, **settings})
    found = ldp.plan(trainer(dp, callbacks=list(callbacks), logger=CSVLogger(".")), module, data or loader(), show=show)
    assert dp.num_releases == 0
    return found


def rows(found):
    return {row.name: row for row in found.coverage.covered}


class WithData(Regression):
    """A module that brings its data, for the command line."""

    net_of = staticmethod(lambda: nn.Linear(3, 2))

    def __init__(self):
        super().__init__(self.net_of())

    def train_dataloader(self):
        return loader()


class Normalised(WithData):
    net_of = staticmethod(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))


class Crossed(nn.Module):
    """Two functions without a per-sample gradient: one of the mean over the batch, one that mixes the samples."""

    def __init__(self):
        super().__init__()
        self.fine, self.mean, self.mixed = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.fine(x) + self.mean(x.mean(0)) + self.mixed(x - x.mean(0))


class Refused(WithData):
    net_of = staticmethod(Crossed)


class TiedGPT(pl.LightningModule):
    """GPT-2 as transformers has it: its head is its embedding."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 8}
        self.gpt = GPT2LMHeadModel(GPT2Config(**sizes))

    def training_step(self, batch, batch_idx):
        return self.gpt(input_ids=batch, labels=batch).loss

    def train_dataloader(self):
        return DataLoader(torch.randint(50, (12, 8)), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# ---- the command line ---------------------------------------------------------------------------------------------


def test_digits(capsys):
    cli = command_line("plan", f"--config={DIGITS}")
    printed = capsys.readouterr().out
    strategy = cli.trainer.strategy
    assert (strategy.num_releases, strategy.epsilon) == (0, 0.0)
    spent = ldp.compute_epsilon(
        noise_multiplier=strategy.noise_multiplier, sample_rate=719 / 1437, num_steps=60, delta=1e-4
    )
    expected = ("DigitsClassifier", "9,610 trainable", "1,437", "719", "0.5003", f"{spent:.4f} of 3", "0.0001", "60")
    assert all(text in printed for text in expected)
    assert "Self-check: passed, on 4 samples." in printed
    table = [line.split() for line in printed.splitlines() if line.strip().startswith("net.")]
    assert [line[:5] for line in table] == [
        ["net.0.weight", "128×64", "linear", "ghost", "norm"],
        ["net.0.bias", "128", "linear", "sum", "over"],
        ["net.2.weight", "10×128", "linear", "ghost", "norm"],
        ["net.2.bias", "10", "linear", "sum", "over"],
    ]
    assert max(map(len, printed.splitlines())) <= 100


def test_console_command(tmp_path):
    command = [sys.executable, "-m", "lightning_dp.cli", "plan", f"--config={DIGITS}", "--trainer.max_steps=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(ldp.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Self-check: passed" in done.stdout
    assert "Best by noise: batch size" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_saved_configuration_of_a_fit_plans_it_too(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line("fit", f"--config={DIGITS}", "--print_config")
    text = capsys.readouterr().out
    cli = command_line("plan", f"--config={text}", "--trainer.max_steps=2")
    assert cli.trainer.strategy.num_releases == 0


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("Normalised", ["layer 'net.1' is a BatchNorm1d"]),
        ("Refused", ["linear of net.mean.weight, net.mean.bias (", "linear of net.mixed.weight, net.mixed.bias ("]),
    ],
)
def test_a_refused_model_ends_with_status_1(module, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line("plan", f"--model=tests.test_plan.{module}", *CPU)
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert all(f"Refused: {text}" in printed or text in printed for text in expected)
    assert printed.rstrip().endswith("This fit would be refused.")
    assert "In all:" not in printed


def test_a_trainer_made_by_a_function():
    from lightning_dp.cli import DPLightningCLI

    def make(max_steps: int = 2, callbacks: list[pl.Callback] | None = None, strategy: str | None = None) -> pl.Trainer:
        return trainer(ldp.DPStrategy(noise_multiplier=1.0), max_steps=max_steps, callbacks=callbacks)

    args = ["plan", "--model=tests.test_plan.WithData", "--trainer.max_steps=3"]
    cli = DPLightningCLI(trainer_class=make, args=args, trainer_defaults={"strategy": None})
    assert cli.trainer.max_steps == 3


# ---- what is said about the parameters ----------------------------------------------------------------------------


def test_a_tied_head_is_one_parameter_with_two_uses_and_cross_terms(capsys):
    command_line("plan", "--model=tests.test_plan.TiedGPT", *CPU)
    printed = capsys.readouterr().out
    assert "Per-sample gradients of gpt.transformer.*" in printed
    table = [line.split() for line in printed.splitlines() if line.rstrip().endswith("%")]
    assert len(table) == 16
    expected = ["h.{0..2}.attn.c_attn.weight", "×3", "16×48", "addmm", "ghost", "norm", "6", "KiB"]
    assert expected in [row[:-1] for row in table]
    assert max(map(len, printed.splitlines())) <= 100
    found = rows(planned(TiedGPT(), TiedGPT().train_dataloader()))
    tied = found["gpt.transformer.wte.weight"]
    assert tied.functions == ("linear", "embedding")
    assert tied.methods == ("ghost norm", "index rows", "cross terms")
    assert "gpt.lm_head.weight" not in found
    assert found["gpt.transformer.wpe.weight"].functions == ("add (derived: to(embedding))",)
    assert found["gpt.transformer.h.0.attn.c_attn.weight"].functions == ("addmm",)


def test_bias_only_holds_nothing_for_frozen_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    found = planned(Regression(net), callbacks=[ldp.BiasOnlyFinetuning()])
    sizes = {"net.0.bias": 16, "net.1.bias": 16, "net.3.bias": 8}
    assert {name: row.bytes_per_sample for name, row in rows(found).items()} == sizes
    assert found.coverage.bytes_per_sample == sum(sizes.values())
    assert (found.frozen, found.num_frozen, found.num_trained) == (3, 12 + 4 + 8, 10)


def test_every_refused_function_is_told_with_its_line_and_the_rest_is_covered():
    found = planned(Regression(Crossed()))
    assert found.is_refused
    assert found.errors == []
    lines = Path(__file__).read_text().splitlines()
    at = next(k for k, line in enumerate(lines, 1) if "self.fine(x) + self.mean" in line)
    told = {r.parameters: (r.function, Path(r.where.rpartition(":")[0]).name) for r in found.coverage.refused}
    assert told == {
        ("net.mean.weight", "net.mean.bias"): ("linear", "test_plan.py"),
        ("net.mixed.weight", "net.mixed.bias"): ("linear", "test_plan.py"),
    }
    assert {r.where.rpartition(":")[2] for r in found.coverage.refused} == {str(at)}
    assert set(rows(found)) == {"net.fine.weight", "net.fine.bias"}
    assert found.coverage.unused == ()
    assert found.time_ratio is None


def test_every_opaque_function_is_told():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Opaque(), Opaque()

        def forward(self, x):
            return self.a(x) + self.b(x)

    module = Regression(Two())
    found = planned(module)
    assert {r.parameters for r in found.coverage.refused} == {("net.a.scale",), ("net.b.scale",)}
    assert all("clipping_engine='loop'" in r.reason for r in found.coverage.refused)
    assert "net.a.head.weight" in rows(found)
    assert all(p.grad is None for p in module.parameters())


def test_gradients_past_the_book_are_told():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
            self.traced = {}

        def forward(self, x):
            return self.last(self.first(x) + _Hidden.of(self.first.bias, x))

    found = planned(Regression(Scripted()))
    assert [r.parameters for r in found.coverage.refused] == [("net.first.bias",)]
    assert "not in the book" in found.coverage.refused[0].reason
    assert rows(found)["net.first.bias"].methods[-1] == "refused"


class _Hidden:
    """A use of a parameter that torch's overrides do not see."""

    @staticmethod
    def of(p, x):
        with torch._C.DisableTorchFunctionSubclass():
            return (p * x.sum(1, keepdim=True)).tanh()


def test_unused_untrained_and_frozen_parameters(capsys):
    class Partly(Regression):
        def __init__(self):
            super().__init__(nn.ModuleDict({name: nn.Linear(3, 2) for name in ("used", "unused", "frozen", "other")}))
            self.net["frozen"].requires_grad_(False)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self.net["used"](x) + self.net["frozen"](x) + self.net["other"](x), y)

        def configure_optimizers(self):
            trained = [p for name, p in self.named_parameters() if "other" not in name]
            return torch.optim.SGD(trained, lr=0.1)

    found = planned(Partly(), show=True)
    printed = capsys.readouterr().out
    assert found.coverage.unused == ("net.unused.weight", "net.unused.bias")
    assert found.untrained == ("net.other.weight", "net.other.bias")
    assert "Warning: no gradient came back to net.unused.weight, net.unused.bias" in printed
    assert "Not trained by the optimizer, and treated as constants: net.other.weight, net.other.bias." in printed
    assert "Frozen: 2 parameters with 8 elements" in printed
    assert set(rows(found)) == {"net.used.weight", "net.used.bias"}
    assert not found.is_refused


def test_derived_and_generic_functions():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.transposed, self.scale, self.power = nn.Linear(2, 3, bias=False), nn.Parameter(torch.ones(2)), None
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
            self.lstm = nn.LSTM(3, 2, batch_first=True)

        def forward(self, x):
            recurrent = self.lstm(x[:, None].expand(-1, 3, -1))[0].mean(1)
            return (x @ self.transposed.weight + self.normed(x) + recurrent).abs() ** self.scale

    found = rows(planned(Regression(Odd())))
    assert found["net.transposed.weight"].functions == ("matmul",)
    assert found["net.scale"].methods == ("generic: sliced",)
    assert found["net.normed.parametrizations.weight.original0"].functions == ("linear (derived: weight_norm)",)
    assert found["net.normed.parametrizations.weight.original0"].methods == ("materialised, carried back",)
    assert found["net.lstm.weight_ih_l0"].functions == ("lstm",)


def test_repeated_uses_are_counted():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.first(self.first(x).tanh()))

    row = rows(planned(Regression(Twice())))["net.first.weight"]
    assert row.functions == ("linear ×2",)
    # Two positions, put together: two inputs saved, and one gradient in the book.
    assert (row.methods, row.bytes_per_sample) == (("materialised, kept",), 4 * (2 * 3 + 3 * 3))


def test_layers_dropped_at_random_are_not_unused():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), nn.Linear(3, 2)

        def forward(self, x):
            for layer in self.layers:
                if torch.rand([]) > 0.5:
                    x = x + layer(x)
            return self.last(x)

    net = Dropped()
    found = planned(Regression(net))
    assert found.coverage.unused == ()
    assert set(rows(found)) == {f"net.{name}" for name, _ in net.named_parameters()}


def test_all_that_a_model_draws_at_random_is_told_apart():
    before = RandomState.of_all()
    assert not RandomState.of_all().differs_from(before)
    for draw in (torch.rand, np.random.rand, lambda _: random.random()):
        draw(1)
        assert RandomState.of_all().differs_from(before)
        before.restore()
        assert not RandomState.of_all().differs_from(before)


# ---- bytes, counted without the engine ----------------------------------------------------------------------------


def counted(module, layer, x):
    """Return the bytes that autograd saves in an ordinary pass of one layer, its parameters apart, and its output."""
    saved, own = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    seen = {}

    def before(_, inputs):
        seen["hooks"] = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        seen["hooks"].__enter__()

    def after(_, inputs, output):
        seen["hooks"].__exit__(None, None, None)
        seen["output"] = output

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    module(x)
    for handle in handles:
        handle.remove()
    return sum(t.untyped_storage().nbytes() for t in saved.values()), seen["output"]


def test_bytes_of_an_mlp():
    net, data = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)), loader(batch_size=10)
    found, x = rows(planned(Regression(net), data)), data.dataset.tensors[0][::2].clone()
    for k in (0, 2):
        saved, output = counted(net, net[k], x)
        weight, bias = found[f"net.{k}.weight"], found[f"net.{k}.bias"]
        assert weight.methods == ("ghost norm",)
        assert weight.bytes_per_sample == (saved + 4 * output.numel()) / len(x)
        assert bias.bytes_per_sample == 4 * net[k].bias.numel()


def test_bytes_and_methods_of_convolutions(monkeypatch):
    module = sys.modules["lightning_dp.bookkeeping.rules.convolution"]  # the package has a function of that name
    monkeypatch.setattr(module, "fastest", lambda key, ways, device: [*ways][-1])  # unfolded, if that is tried

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 64, 5), nn.Linear(64, 2)

        def forward(self, x):
            x = self.early(x.reshape(-1, 1, 1, 3).repeat(1, 1, 8, 3)[..., :8])
            return self.head(self.late(x.tanh()).tanh().mean((2, 3)))

    net, data = Images(), loader(batch_size=10)
    found, x = rows(planned(Regression(net), data)), data.dataset.tensors[0][::2].clone()
    saved, _ = counted(net, net.early, x)
    early = found["net.early.weight"]
    assert early.methods == ("materialised, kept",)
    assert early.bytes_per_sample == saved / len(x) + 4 * net.early.weight.numel()
    saved, output = counted(net, net.late, x)
    late, positions = found["net.late.weight"], output.shape[2] * output.shape[3]
    assert late.methods == ("ghost norm",)
    unfolded = 4 * positions * net.late.weight[0].numel()
    assert late.bytes_per_sample == saved / len(x) + unfolded + 4 * output[0].numel()


def test_a_kept_gradient_counts():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(x[:, None].expand(-1, 200, -1).contiguous()).mean(1)

    row = rows(planned(Regression(Long())))["net.last.weight"]
    assert row.methods == ("materialised, kept",)
    # The inputs are saved until the output gradient comes back; then the gradient is there in place of both.
    assert row.bytes_per_sample == 4 * (200 * 3 + 2 * 3)


def test_what_several_parameters_share_is_counted_once_in_all():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.a(x) * self.b(x)

    found = planned(Regression(Shared()))
    assert [row.bytes_per_sample for row in found.coverage.covered] == [20, 20]
    assert found.coverage.bytes_per_sample == 20 + 8


# ---- the settings of the fit --------------------------------------------------------------------------------------


def test_the_epsilon_is_what_the_fit_then_spends():
    dp = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=3.0)
    fit = trainer(dp, max_steps=100, callbacks=[ldp.PrivacyBudgetStopping()], enable_checkpointing=False)
    module = Regression()
    found = ldp.plan(fit, module, loader(), show=False)
    assert found.planned_steps == 100
    assert found.steps < 100
    fit.fit(module, loader())
    assert (dp.num_releases, dp.epsilon) == (found.steps, found.epsilon)


def test_a_resumed_fit_plans_what_is_left(tmp_path_factory):
    at = tmp_path_factory.mktemp("elsewhere")
    first = trainer(max_steps=2, callbacks=[ModelCheckpoint(at, save_last=True)])
    first.fit(Regression(), loader())
    before = {path.name: path.read_bytes() for path in at.iterdir()}
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    found = ldp.plan(trainer(dp, max_steps=5), Regression(), loader(), ckpt_path=at / "last.ckpt", show=False)
    assert (found.planned_steps, found.steps, dp.num_releases) == (5, 3, 2)
    assert found.epsilon == ldp.compute_epsilon(noise_multiplier=1.0, sample_rate=0.25, num_steps=5, delta=1 / 200)
    spent = ldp.DPStrategy(noise_multiplier=1.0, target_epsilon=first.strategy.epsilon + 1e-3)
    found = ldp.plan(trainer(spent, max_steps=5), Regression(), loader(), ckpt_path=at / "last.ckpt", show=False)
    assert found.is_refused
    assert "the next step would exceed target_epsilon" in found.errors[0]
    assert {path.name: path.read_bytes() for path in at.iterdir()} == before


def test_endless_training(capsys):
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    found = ldp.plan(trainer(dp, max_steps=-1, max_epochs=-1), Regression(), loader())
    assert (found.steps, found.epsilon, found.is_refused) == (None, None, False)
    assert "no limit" in capsys.readouterr().out


def test_the_self_check_is_told(capsys):
    class Coupled(Regression):
        def training_step(self, batch, batch_idx):
            out = self.net(batch[0])
            return (out - out.mean(0)).square().mean()

    found = planned(Coupled(), show=True)
    assert found.is_refused
    assert "self-check (c)" in found.errors[0]
    assert "Self-check: failed" in capsys.readouterr().out
    found = planned(Coupled(), self_check=False)
    assert found.self_check == "switched off (self_check=False)"
    assert not found.is_refused
    assert planned(Regression(), loader(n=1, batch_size=1)).self_check.startswith("not run")


def test_the_loop_is_not_called_a_book(capsys):
    found = planned(Regression(Opaque()), clipping_engine="loop", show=True)
    printed = capsys.readouterr().out
    assert found.physical_batch_size == 1
    assert {row.methods for row in found.coverage.covered} == {("loop: one backward pass per sample",)}
    assert rows(found)["net.head.weight"].bytes_per_sample == 24
    assert "no book is kept" in printed
    assert "the book holds" not in printed
    assert found.self_check.startswith("not needed")
    assert found.time_ratio > 1.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"overfit_batches": 2}, "overfit_batches is set"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"max_steps": 0}, "would end before its first step"),
    ],
)
def test_a_refused_trainer(change, expected, capsys):
    settings = trainer(ldp.DPStrategy(noise_multiplier=1.0), **change)
    found = ldp.plan(settings, Regression(), loader())
    assert found.is_refused
    assert expected in found.errors[0]
    assert "Refused" in capsys.readouterr().out


def test_a_refused_dataloader_and_optimizer():
    sampler = WeightedRandomSampler([1.0] * 20, 20)
    found = planned(Regression(), DataLoader(loader().dataset, batch_size=5, sampler=sampler))
    assert "WeightedRandomSampler" in found.errors[0]
    assert "LBFGS" in planned(Regression(optimizer=torch.optim.LBFGS)).errors[0]
    module = Regression()
    module.net.weight.register_post_accumulate_grad_hook(lambda p: None)
    assert "has a gradient hook" in planned(module).errors[0]


def test_a_model_that_cannot_be_observed():
    class Nothing(Regression):
        def training_step(self, batch, batch_idx):
            return None

    assert "returned no loss" in planned(Nothing()).errors[0]
    net = nn.Sequential(nn.Flatten(), nn.Embedding(5, 2, max_norm=1.0), nn.Flatten())

    class Words(Regression):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0].long().abs() % 5).square().mean()

    found = planned(Words(net))
    assert "max_norm" in found.errors[0]
    assert (found.coverage.covered, found.coverage.unused) == ((), ())
    assert found.self_check.startswith("not run")


def test_another_strategy_is_an_error():
    with pytest.raises(ldp.PrivacyConfigurationError, match="a plan with strategy=SingleDeviceStrategy: expected"):
        ldp.plan(pl.Trainer(accelerator="cpu", logger=False), Regression(), loader())


def test_manual_optimization_is_covered_and_its_public_optimizer_told(capsys):
    module, dp = GAN().double(), ldp.DPStrategy(noise_multiplier=1.0)
    before, fit = parameters(module), trainer(dp, max_epochs=2, max_steps=-1)
    found = ldp.plan(fit, module, real_samples())
    assert found.public == tuple(name for name in before if name.startswith("generator"))
    assert set(rows(found)) == {name for name in before if name.startswith("discriminator")}
    assert rows(found)["discriminator.0.weight"].functions == ("linear ×2",)
    printed = capsys.readouterr().out
    assert "planned logical batches" in printed
    assert "Trained without noise" in printed
    assert found.self_check.startswith("passed")
    assert found.time_ratio is not None
    assert (dp.num_releases, fit.global_step) == (0, 0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
    fit.fit(module, real_samples())
    assert (dp.num_releases, dp.epsilon) == (found.steps, found.epsilon)


def test_manual_optimization_that_couples_samples_is_refused():
    class Coupled(GAN):
        def judged(self, x, truth):
            out = self.discriminator(x)
            return (out - out.mean(0)).square().mean() + super().judged(x, truth)

    found = ldp.plan(trainer(ldp.DPStrategy(noise_multiplier=1.0)), Coupled().double(), real_samples(), show=False)
    assert "self-check" in found.errors[0]


def test_a_training_step_that_writes_parameters_by_itself_is_put_back():
    class Averages(Regression):
        def __init__(self):
            super().__init__()
            self.average = nn.Parameter(torch.zeros(2, 3), requires_grad=False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.average.lerp_(self.net.weight, 0.5)
            return super().training_step(batch, batch_idx)

    module = Averages()
    found = planned(module)
    assert found.errors == []
    assert float(module.average.detach().abs().sum()) == 0
    assert "writes into the parameter 'average'" in planned(module, self_check=False).errors[0]


# ---- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_of_a_plan_is_that_of_the_fit(capsys, with_tables):
    dp = ldp.DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant="rdp")
    found = ldp.plan(trainer(dp, max_steps=8), Regression(), loader())
    printed = capsys.readouterr().out
    numbers = {"num_examples": 20, "batch_size": 5, "target_delta": 1e-3, "accountant": "rdp"}
    alone = ldp.forecast(**numbers, target_epsilon=2.0, num_steps=8)
    assert (found.forecast.noise_for, found.forecast.batches) == (alone.noise_for, alone.batches)
    assert (found.forecast.epsilon, found.forecast.noise_multiplier) == (found.epsilon, found.noise_multiplier)
    for title in (
        "Epsilon over the steps",
        "Noise for other epsilons, 8 steps",
        "Other batch sizes, the same work (2 ",
    ):
        assert title in printed
    assert "planned end" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_given_noise_is_compared_with_the_noise_that_would_do(with_tables, capsys):
    dp = ldp.DPStrategy(target_epsilon=2.0, noise_multiplier=1.2, target_delta=1e-3, accountant="rdp")
    found = ldp.plan(trainer(dp, max_steps=30), Regression(), loader())
    allowed = ldp.max_steps(
        target_epsilon=2.0, target_delta=1e-3, noise_multiplier=1.2, sample_rate=0.25, accountant="rdp"
    )
    assert (found.steps, found.forecast.num_allowed, found.forecast.num_steps) == (allowed, allowed, 30)
    assert found.forecast.epsilon > 2 > found.epsilon
    enough = ldp.forecast(sample_rate=0.25, target_delta=1e-3, target_epsilon=2.0, num_steps=30, accountant="rdp")
    (noise,) = [row.noise_multiplier for row in found.forecast.noise_for if row.epsilon == 2.0]
    assert noise == pytest.approx(enough.noise_multiplier, rel=0.01)
    assert f"{allowed}" in [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if "the last within" in line
    ]


def test_the_budget_of_a_resumed_fit_starts_from_what_is_spent(tmp_path, with_tables, capsys):
    at = tmp_path.parent / f"{tmp_path.name}-checkpoints"
    saving = ModelCheckpoint(at, save_last=True)
    settings = {"noise_multiplier": 1.0, "accountant": "rdp"}
    first = trainer(ldp.DPStrategy(**settings), callbacks=[saving], enable_checkpointing=True, max_steps=2)
    first.fit(Regression(), loader())
    fit = trainer(ldp.DPStrategy(**settings), max_steps=5)
    found = ldp.plan(fit, Regression(), loader(), ckpt_path=at / "last.ckpt")
    assert "Epsilon over further steps, after 2 made before" in capsys.readouterr().out
    assert found.forecast.num_steps == 3
    common = {"noise_multiplier": 1.0, "sample_rate": 0.25, "delta": 1 / 200, "accountant": "rdp"}
    for row in found.forecast.after_steps:
        assert row.epsilon == pytest.approx(ldp.compute_epsilon(num_steps=2 + row.num_steps, **common))


def test_there_is_no_forecast_without_noise_or_before_the_numbers_are_known():
    assert planned(Regression(), noise_multiplier=0).forecast is None
    assert planned(Regression(), DataLoader(loader().dataset, batch_size=30)).forecast is None


def test_the_budget_counts_all_releases_from_a_draw():
    dp = ldp.DPStrategy(noise_multiplier=2.0)
    fit = trainer(dp, max_epochs=3, max_steps=-1)
    found = ldp.plan(fit, FeatureMatching().double(), real_samples(), show=False).forecast
    expected = ldp.compute_epsilon(noise_multiplier=2.0 / 2**0.5, sample_rate=1.0, num_steps=3, delta=found.delta)
    assert (found.releases_per_draw, found.num_steps) == (2, 3)
    assert found.epsilon == pytest.approx(expected, rel=1e-9)
    (row,) = [row for row in found.noise_for if row.epsilon == found.goal]
    assert row.noise_multiplier == pytest.approx(2.0, rel=1e-9)


def test_the_budget_is_drawn(tmp_path):
    path = tmp_path.parent / f"{tmp_path.name}.png"
    for data in (DataLoader(loader().dataset, batch_size=30), loader()):  # the first is refused
        assert not path.exists()
        dp = ldp.DPStrategy(noise_multiplier=1.0, accountant="rdp")
        ldp.plan(trainer(dp), Regression(), data, show=False, plot=path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_budget_is_drawn_by_the_command(tmp_path):
    path = tmp_path.parent / f"{tmp_path.name}.png"
    command_line("plan", "--model=tests.test_plan.WithData", *CPU, f"--plot={path}")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_plan(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fit = trainer(ldp.DPStrategy(noise_multiplier=1.0))
    monkeypatch.setattr(fit, "fit", lambda *_, **__: pytest.fail("planned"))
    with pytest.raises(ldp.PrivacyConfigurationError, match="a plot needs matplotlib"):
        ldp.plan(fit, Regression(), loader(), plot="plan.png")


# ---- nothing is left ----------------------------------------------------------------------------------------------


class Acts(pl.Callback):
    """Notes which hooks of a callback were run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith(("on_", "setup", "teardown", "before_")) and name != "on_load_checkpoint":
            object.__getattribute__(self, "seen").append(name)
        return super().__getattribute__(name)


class Remembers(Regression):
    """Has a buffer, draws at random, and logs."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        random.random(), np.random.rand()
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_callbacks(self):
        return [ModelCheckpoint("checkpoints", every_n_train_steps=1, save_on_train_epoch_end=True)]


def random_numbers():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("breaks", [False, True])
def test_no_trace(breaks):
    class Module(Remembers):
        def configure_optimizers(self):
            torch.rand(3)  # what setting up draws is put back too
            return torch.optim.LBFGS(self.parameters()) if breaks else super().configure_optimizers()

    module, acts = Module(), Acts()
    before, numbers = parameters(module), random_numbers()
    dp = ldp.DPStrategy(noise_multiplier=1.0)
    fit = trainer(dp, callbacks=[acts], logger=CSVLogger("."), num_sanity_val_steps=2)
    was = list(fit.callbacks), fit.loggers, fit.profiler, fit.num_sanity_val_steps
    acts.seen.clear()
    found = ldp.plan(fit, module, loader(), show=False)
    assert found.is_refused == breaks
    assert (dp.num_releases, fit.global_step, float(module.steps)) == (0, 0, 0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
    assert random_numbers() == numbers
    assert (fit.callbacks, fit.loggers, fit.profiler, fit.num_sanity_val_steps) == was
    assert fit.callback_metrics == {}
    set_up = ["setup"] if breaks else ["setup", "on_fit_start", "on_train_start", "teardown"]
    assert [name for name in acts.seen if name != "on_save_checkpoint"] == set_up


def test_a_fit_after_a_plan_is_the_fit_without_one():
    results = []
    for with_plan in (False, True):
        torch.manual_seed(0)
        module, fit = Regression(), trainer(ldp.DPStrategy(noise_multiplier=0), max_epochs=2, max_steps=-1)
        data = loader(batch_size=20)
        if with_plan:
            ldp.plan(fit, module, data, show=False)
        fit.fit(module, data)
        results.append((fit.global_step, fit.current_epoch, *parameters(module).values()))
    assert results[0][:2] == results[1][:2] == (2, 2)
    assert all(torch.equal(p, q) for p, q in zip(results[0][2:], results[1][2:], strict=True))


def test_an_error_of_the_user_is_the_users():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            raise ValueError("out of luck")

    acts = Acts()
    with pytest.raises(ValueError, match="out of luck"):
        planned(Fails(), callbacks=[acts])
    assert "on_exception" not in acts.seen


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"a.{i}.w" for i in range(12)], ["a.{0..11}.w"]),
        (["a.0.w", "a.2.w", "a.5.w"], ["a.{0,2,5}.w"]),
        ([f"a.{i}.b.{j}" for i in range(2) for j in range(3)], ["a.{0..1}.b.{0..2}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.{0..1}.b.0", "a.0.b.1"]),
        (["a.0.w", "a.0.v", "a.1.w", "a.1.v"], ["a.{0..1}.w", "a.{0..1}.v"]),
        (["a", "a.0", "0.a"], ["a", "a.0", "0.a"]),
        ([], []),
    ],
)
def test_names_are_put_together(names, expected):
    found = collapsed(names, lambda name: name)
    assert [name for name, _ in found] == expected
    assert sorted(name for _, members in found for name in members) == sorted(names)


def test_only_what_is_alike_is_put_together():
    names = ["a.0", "a.1", "a.2", "a.3"]
    found = collapsed(names, lambda name: name, lambda name: name in ("a.0", "a.1", "a.3"))
    assert found == [("a.{0,1,3}", ["a.0", "a.1", "a.3"]), ("a.2", ["a.2"])]
