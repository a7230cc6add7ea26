"""What is frozen and what is added, and that the rest is trained as a per-sample loop over the biases would."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as lightning
from torch import nn

import lightning_dp as ldp
from lightning_dp.callbacks.selection import is_bias, matches
from lightning_dp.cli import DPLightningCLI
from tests.models import Regression, clipped_mean, loader, parameters, trainer, updates
from tests.strategies.reference import assert_equal, by_hand, private_fit, whole

UNCHECKED = {"noise_multiplier": 0, "self_check": False}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_only_biases_and_what_is_unfrozen_move():
    module = Regression(net())
    before = parameters(module)
    trainer(callbacks=[ldp.BiasOnlyFinetuning(unfreeze=("net.3",))]).fit(module, loader(dtype=torch.float64))
    moved = {name for name, u in updates(module, before).items() if bool((u != 0).any())}
    assert moved == {"net.0.bias", "net.1.bias", "net.3.weight", "net.3.bias"}


def test_the_update_is_that_of_a_loop_over_the_biases():
    module, data = Regression(net()), loader(dtype=torch.float64, batch_size=20)
    x, y = data.dataset.tensors
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    expected = clipped_mean(module, lambda i: (x[i : i + 1], y[i : i + 1]), 20)
    module.requires_grad_(True)
    before = parameters(module)
    dp = ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, max_steps=1, callbacks=[ldp.BiasOnlyFinetuning()]).fit(module, data)
    found = updates(module, before)
    assert all(torch.allclose(-found[name], g, rtol=1e-12, atol=1e-15) for name, g in expected.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.bias", True), ("in_proj_bias", True), ("lstm.bias_ih_l0", True), ("bias.weight", False), ("a.weight", False)],
)
def test_is_bias(name, expected):
    assert is_bias(name) == expected


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.head.weight", "head", True),
        ("head.weight", "head", True),
        ("model.head.0.weight", "model.head", True),
        ("model.header.weight", "head", False),
        ("model.norm1.weight", "*.norm*.weight", True),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) == expected


def test_errors():
    with pytest.raises(ldp.PrivacyConfigurationError, match="'heed' fits no parameter; there are net.0.weight"):
        trainer(callbacks=[ldp.BiasOnlyFinetuning(unfreeze="heed")]).fit(Regression(net()), loader())
    with pytest.raises(ldp.PrivacyConfigurationError, match="none of the 1 parameters is a bias"):
        trainer(callbacks=[ldp.BiasOnlyFinetuning()]).fit(Regression(nn.Linear(3, 2, bias=False)), loader())


# ---- the share ---------------------------------------------------------------------------------------------------


def roberta_large():
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    return transformers.RobertaForSequenceClassification(config)


def vit_large():
    return pytest.importorskip("timm").create_model("vit_large_patch16_224", num_classes=100)


@pytest.mark.parametrize(
    ("make", "head", "line"),
    [
        (
            roberta_large,
            "classifier",
            "271,360 of 354,310,144 parameters are trained (0.077%), besides 1,051,650 of classifier.",
        ),
        (vit_large, "head", "272,384 of 303,301,632 parameters are trained (0.090%), besides 102,500 of head."),
    ],
)
def test_the_share_is_that_of_the_paper(make, head, line, caplog):
    """In arXiv 2210.00036 it is 0.077 % of RoBERTa-large and 0.090 % of ViT-large; a new head is on neither side."""
    with torch.device("meta"):
        module = Regression(make())
    callback = ldp.BiasOnlyFinetuning(unfreeze=(head,))
    with caplog.at_level("INFO"):
        callback.setup(trainer(callbacks=[callback]), module, "fit")
    assert [record.message for record in caplog.records if "Bias-only" in record.message] == [f"Bias-only: {line}"]


# ---- biases that are added ---------------------------------------------------------------------------------------


def bare(bias=False):
    torch.manual_seed(0)
    layers = nn.Linear(3, 8, bias=bias), nn.ReLU(), nn.LayerNorm(8, bias=bias), nn.Linear(8, 2, bias=bias)
    return nn.Sequential(*layers).double()


def adding(**settings):
    return ldp.BiasOnlyFinetuning(add_missing=True, **settings)


def with_zero_biases(module):
    """Return a copy whose layers torch has made with biases, of which only these are trained."""
    net = bare(bias=True)
    net.load_state_dict(module.net.state_dict(), strict=False)
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith("bias"))
        if name.endswith("bias"):
            p.data.zero_()
    return Regression(net)


def test_added_biases_are_trained_as_those_that_were_there():
    module, data = Regression(bare()), whole()
    expected = by_hand(with_zero_biases(module), data)
    fit = private_fit(module, data, strategy=UNCHECKED, callbacks=[adding()])
    assert_equal(module, expected)
    biases = [module.net[k].bias for k in (0, 2, 3)]
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(module, data)
    assert all(module.net[k].bias is b for k, b in zip((0, 2, 3), biases, strict=True))
    assert_equal(module, by_hand(with_zero_biases(Regression(bare())), data, 5))


def test_a_resume_loads_them(tmp_path):
    module, data = Regression(bare()), whole()
    expected = by_hand(with_zero_biases(module), data)
    first, second = copy.deepcopy(module), copy.deepcopy(module)
    kept = lightning.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[adding(), kept]).fit(first, data)
    again = trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[adding()], enable_checkpointing=False)
    again.fit(second, data, ckpt_path=tmp_path / "step=2.ckpt")
    assert_equal(second, expected)


class Late(Regression):
    """Makes its layers when Lightning asks for them, once."""

    def __init__(self, hook):
        super().__init__(nn.Identity())
        self.hook = hook

    def _make(self, hook):
        if hook == self.hook and isinstance(self.net, nn.Identity):
            self.net = bare()
        if self.hook == "lazily" and hook == "configure_model" and isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(nn.LazyLinear(8, bias=False), nn.ReLU(), *bare()[2:]).double()
            self.net(torch.zeros(1, 3, dtype=torch.float64))

    def setup(self, stage):
        self._make("setup")

    def configure_model(self):
        self._make("configure_model")


@pytest.mark.parametrize("hook", ["setup", "configure_model", "lazily"])
def test_layers_that_are_made_late(hook, tmp_path):
    module, data = Late(hook), whole()
    kept = lightning.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = private_fit(module, data, strategy=UNCHECKED, callbacks=[adding(), kept])
    names = {"net.0.bias", "net.2.bias", "net.3.bias"}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == names
    assert all(bool((module.get_parameter(name) != 0).any()) for name in names)
    assert not {"setup", "configure_model"} & set(vars(module))
    again = Late(hook)
    trainer(ldp.DPStrategy(**UNCHECKED), callbacks=[adding()], enable_checkpointing=False).fit(
        again, data, ckpt_path=tmp_path / "step=3.ckpt"
    )
    assert_equal(again, parameters(module))
    assert fit.global_step == 3


def test_a_hook_that_the_user_has_put_on_the_object_stays():
    module, calls = Regression(bare()), []
    own = module.configure_model = lambda: calls.append(1)
    private_fit(module, whole(), 1, strategy=UNCHECKED, callbacks=[adding()])
    assert module.configure_model is own
    assert calls == [1]


def test_a_lazy_module_is_refused():
    module = Regression(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)))
    with pytest.raises(ldp.PrivacyConfigurationError, match="'net.0.weight' is not initialised yet"):
        trainer(callbacks=[ldp.BiasOnlyFinetuning()]).fit(module, loader())


class Bare(Regression):
    def __init__(self):
        super().__init__(bare())


class Made(Regression):
    """The same with biases."""

    def __init__(self):
        super().__init__(bare(bias=True))


def test_checkpoints_are_used_without_the_callback(tmp_path):
    module, data = Bare(), whole(shuffle=False)
    fit = private_fit(module, data, strategy=UNCHECKED, callbacks=[adding()])
    fit.save_checkpoint(tmp_path / "last.ckpt")
    (expected,) = fit.predict(module, data)
    quiet = {"enable_checkpointing": False}

    made = Made.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(trainer("auto", **quiet).predict(made, data)[0], expected)

    with pytest.raises(RuntimeError, match="Unexpected key.*net.0.bias"):
        Bare.load_from_checkpoint(tmp_path / "last.ckpt")
    prepared = Bare()
    ldp.add_missing_biases(prepared)
    prepared.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(trainer("auto", **quiet).predict(prepared, data)[0], expected)

    with_callback = trainer("auto", callbacks=[adding()], **quiet)
    assert torch.equal(with_callback.predict(Bare(), data, ckpt_path=tmp_path / "last.ckpt")[0], expected)

    with pytest.warns(UserWarning, match="not in the model state dict"):  # what the docstring warns of
        dropped = Bare.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    assert not torch.allclose(trainer("auto", **quiet).predict(dropped, data)[0], expected, rtol=1e-2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, bias=False)
        self.head = nn.Linear(12, 2, bias=False)

    def forward(self, x):
        return self.head(self.block(x[..., None].expand(-1, -1, 4)).flatten(1))


def test_attention_with_the_self_check():
    module, dp = Regression(Attention().double()), ldp.DPStrategy(noise_multiplier=0)
    trainer(dp, max_steps=1, callbacks=[adding()]).fit(module, whole())
    moved = {name for name, p in module.named_parameters() if name.endswith("bias") and bool((p != 0).any())}
    layers = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.", "norm1.", "norm2.")
    assert moved == {*[f"net.block.{layer}bias" for layer in layers], "net.head.bias"}


def test_what_was_added_and_what_was_not_is_said(caplog):
    net = nn.Sequential(nn.Linear(3, 8, bias=False), *[nn.RMSNorm(8) for _ in range(7)], nn.Linear(8, 2))
    with caplog.at_level("INFO"):
        trainer(callbacks=[adding()], max_steps=1).fit(Regression(net), loader())
    said = [record.message for record in caplog.records if "Bias-only" in record.message]
    names = ", ".join(f"RMSNorm 'net.{k}'" for k in range(1, 6))
    assert said == [
        "Bias-only: zero biases were added to 1 layer that had none.",
        f"Bias-only: no bias was added to {names} and 2 others, which would not use it.",
        "Bias-only: 10 of 106 parameters are trained (9.434%).",
    ]


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
def test_copies_of_the_module_without_the_biases_are_refused(name):
    if not hasattr(lightning, name):
        pytest.skip("came with Lightning 2.6")
    arguments = {"swa_lrs": 0.1} if name.startswith("Stochastic") else {}
    module, average = Regression(bare()), getattr(lightning, name)(**arguments)
    with pytest.raises(ldp.PrivacyConfigurationError, match=rf"\(add_missing=True\) with {name}.*add_missing_biases"):
        trainer(callbacks=[average, adding()]).fit(module, whole())
    ldp.add_missing_biases(module)
    given = [average, ldp.BiasOnlyFinetuning()]
    private_fit(module, whole(), strategy=UNCHECKED, callbacks=given, max_epochs=3, max_steps=-1)


# ---- from YAML ---------------------------------------------------------------------------------------------------


class Digits(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(n=12, batch_size=12)


class BareFloat(Regression):
    def __init__(self):
        super().__init__(bare().float(), lr=0.1)


def test_a_configuration_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    arguments = {"unfreeze": ["net.3"], "add_missing": True, "after_epoch": 1, "learning_rate_factor": 10.0}
    settings = {
        "trainer": {
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False),
            "accelerator": "cpu",
            "max_epochs": 3,
            "callbacks": [{"class_path": "lightning_dp.BiasOnlyFinetuning", "init_args": arguments}],
            "strategy": {"class_path": "lightning_dp.DPStrategy", "init_args": {"target_epsilon": 3.0}},
        },
        "model": {"class_path": f"{__name__}.BareFloat"},
        "data": {"class_path": f"{__name__}.Digits"},
    }
    (tmp_path / "bias.yaml").write_text(yaml.safe_dump(settings))
    cli = DPLightningCLI(args=["fit", f"--config={tmp_path / 'bias.yaml'}"], save_config_callback=None)
    assert cli.trainer.strategy.num_releases == 3
    assert cli.trainer.strategy.epsilon <= 3.0
    trained = {name for name, p in cli.model.named_parameters() if p.requires_grad}
    assert trained == {"net.0.bias", "net.2.bias", "net.3.bias", "net.3.weight"}
    assert all(bool((p != 0).any()) for name, p in cli.model.named_parameters() if name in trained)
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == [1.0]
