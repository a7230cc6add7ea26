"""Zero biases: they change nothing at first, take part then, and are those that torch's own layers would have."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lightning_dp as ldp

PLAIN = {
    "linear": (lambda **bias: nn.Linear(3, 4, **bias), [(5, 3)]),
    "linear of sequences": (lambda **bias: nn.Linear(3, 4, **bias), [(5, 7, 3)]),
    "bilinear": (lambda **bias: nn.Bilinear(3, 2, 4, **bias), [(5, 3), (5, 2)]),
    "conv1d": (lambda **bias: nn.Conv1d(4, 6, 3, groups=2, stride=2, **bias), [(5, 4, 9)]),
    "conv2d": (lambda **bias: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", **bias), [(5, 4, 9, 8)]),
    "conv3d": (lambda **bias: nn.Conv3d(2, 3, 2, dilation=2, **bias), [(2, 2, 5, 6, 7)]),
    "conv1d transposed": (lambda **bias: nn.ConvTranspose1d(4, 6, 3, **bias), [(5, 4, 9)]),
    "conv2d transposed": (lambda **bias: nn.ConvTranspose2d(4, 6, 3, stride=2, **bias), [(5, 4, 9, 8)]),
    "conv3d transposed": (lambda **bias: nn.ConvTranspose3d(2, 3, 2, **bias), [(2, 2, 3, 4, 5)]),
    "layer norm": (lambda **bias: nn.LayerNorm([2, 4], **bias), [(5, 2, 4)]),
    "attention": (lambda **bias: nn.MultiheadAttention(4, 2, **bias), [(5, 3, 4)] * 3),
    "attention of others": (lambda **bias: nn.MultiheadAttention(4, 2, kdim=4, vdim=4, **bias), [(5, 3, 4)] * 3),
    "block": (lambda **bias: nn.TransformerEncoderLayer(4, 2, 8, 0.0, **bias), [(5, 3, 4)]),
}


def tensors(shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def output(layer, inputs):
    result = layer(*inputs)
    return result[0] if isinstance(result, tuple) else result


def with_random_biases(layer, names):
    g = torch.Generator().manual_seed(2)
    for name in names:
        layer.get_parameter(name).data.normal_(generator=g)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_added_is_what_torch_would_have_made(kind, dtype):
    make, shapes = PLAIN[kind]
    layer, inputs = make(bias=False).to(dtype), tensors(shapes, dtype)
    before = output(layer, inputs)
    added = ldp.add_missing_biases(layer).added
    assert torch.equal(output(layer, inputs), before)
    theirs = make(bias=True).to(dtype)
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert set(added) == set(theirs.state_dict()) - set(make(bias=False).state_dict())
    assert all(p.dtype == dtype and p.requires_grad for p in layer.parameters())
    theirs.load_state_dict(with_random_biases(layer, added).state_dict())
    assert torch.equal(output(layer, inputs), output(theirs, inputs))
    assert not torch.equal(output(layer, inputs), before)


@pytest.mark.parametrize(
    ("layer", "size", "shape"),
    [
        (nn.LayerNorm(4, elementwise_affine=False), 4, (5, 4)),
        (nn.GroupNorm(2, 4, affine=False), 4, (5, 4, 3)),
        (nn.BatchNorm2d(4, affine=False).eval(), 4, (5, 4, 3, 3)),
        (nn.InstanceNorm1d(4), 4, (5, 4, 3)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_normalisations_without_a_scale(layer, size, shape):
    (x,) = tensors([shape], torch.float64)
    net = nn.Sequential(nn.Linear(1, 1), layer).double()  # from the first the type is taken
    before = layer(x)
    assert ldp.add_missing_biases(net).added == ("1.bias",)
    assert torch.allclose(layer(x), before, rtol=1e-14, atol=1e-15)  # torch adds in another order
    b = torch.arange(1.0, size + 1, dtype=torch.float64)
    layer.bias.data.copy_(b)
    axis = -1 if isinstance(layer, nn.LayerNorm) else 1
    expected = (before.movedim(axis, -1) + b).movedim(-1, axis)
    assert torch.allclose(layer(x), expected, rtol=1e-14, atol=1e-14)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Deaf(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Switched(nn.Conv1d):
    """Another function as soon as it has a bias."""

    def forward(self, x):
        return super().forward(x) if self.bias is None else -super().forward(x)


class Muted(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else 0 * self.bias)


class Strange(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x * mask)


class Image(nn.LayerNorm):
    """Channels come first, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Counting(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return super().forward(F.dropout(x))


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class Boolean(nn.Linear):
    def __init__(self):
        super().__init__(3, 3, bias=False)
        del self._parameters["bias"]
        self.bias = False


@pytest.mark.parametrize(
    ("make", "takes"),
    [
        (lambda: Scaled(3, 4, bias=False), True),
        (lambda: Image(3, bias=False), True),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 4, bias=False)), True),
        (lambda: parametrizations.weight_norm(Scaled(3, 4, bias=False)), True),
        (lambda: Scaled(3, 4, bias=False, device="meta"), True),
        (lambda: Deaf(3, 4, bias=False), False),
        (lambda: Deaf(3, 4, bias=False, device="meta"), False),
        (lambda: Muted(3, 4, bias=False), False),
        (lambda: Switched(3, 4, 1, bias=False), False),
        (lambda: Strange(3, 4, bias=False), False),
        (lambda: Boolean(), False),
        (lambda: nn.RMSNorm(3), False),
        (lambda: MyRMSNorm(), False),
    ],
)
def test_a_bias_that_would_have_no_effect_is_not_added(make, takes):
    net = nn.ModuleDict({"it": make()})
    names = set(dict(net.named_parameters()))
    found = ldp.add_missing_biases(net)
    assert set(dict(net.named_parameters())) - names == ({"it.bias"} if takes else set())
    assert found.added == (("it.bias",) if takes else ())
    assert found.left_out == (() if takes else (f"{type(net['it']).__name__} 'it'",))


def test_a_forward_pass_that_somebody_replaced_is_tried_too():
    net = nn.Linear(3, 4, bias=False)
    net.forward = lambda x: x @ net.weight.T
    assert ldp.add_missing_biases(net).added == ()


def test_integers_get_no_bias():
    net = nn.Linear(3, 4, bias=False)
    net.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert ldp.add_missing_biases(net).left_out == ("Linear ''",)


def test_trying_a_layer_leaves_no_trace():
    layer = Counting(3, 4, bias=False)
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = torch.get_rng_state()
    assert ldp.add_missing_biases(layer).added == ("bias",)
    assert layer.calls == layer.seen == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_call_adds_nothing_and_biases_that_are_there_stay():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Embedding(3, 4), nn.LSTM(4, 4, bias=False))
    own = net[0].bias
    assert ldp.add_missing_biases(net).added == ("1.bias",)
    first = net[1].bias
    assert ldp.add_missing_biases(net) == ldp.add_missing_biases(nn.ReLU())
    assert net[0].bias is own
    assert net[1].bias is first


def test_a_lazy_module_is_refused_until_it_has_run():
    net = nn.Sequential(nn.LazyLinear(4, bias=False), nn.Linear(4, 2))
    with pytest.raises(ldp.PrivacyConfigurationError, match="'0.weight' is not initialised yet .*one forward pass"):
        ldp.add_missing_biases(net)
    net(torch.zeros(1, 3))
    assert ldp.add_missing_biases(net).added == ("0.bias",)


def families():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **small)),
        "t5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1)
        ),
    }


@pytest.mark.parametrize(
    ("family", "added", "left_out"),
    [
        ("gpt2", {"lm_head.bias"}, None),  # Conv1D has biases
        ("llama", {"lm_head.bias", "q_proj.bias", "o_proj.bias", "down_proj.bias"}, "LlamaRMSNorm 'model.norm'"),
        ("t5", {"q.bias", "o.bias", "wo.bias"}, "T5LayerNorm 'encoder.final_layer_norm'"),
    ],
)
def test_models_of_transformers(family, added, left_out):
    model = families()[family]().eval()
    tokens = torch.arange(10).view(2, 5)
    before = model(input_ids=tokens)[0]
    assert "Conv1D" in str(model) or family != "gpt2"
    found = ldp.add_missing_biases(model)
    ends = {".".join(name.split(".")[-2:]) for name in found.added}
    assert added <= ends
    assert (left_out in found.left_out) if left_out else not found.left_out
    assert torch.equal(model(input_ids=tokens)[0], before)
    model(input_ids=tokens)[0].square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in found.added)


def test_trained_biases_are_loaded_into_a_module_made_without_them():
    source = families()["t5"]().eval()
    bare = copy.deepcopy(source)
    with_random_biases(source, ldp.add_missing_biases(source).added)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        bare.load_state_dict(source.state_dict())
    ldp.add_missing_biases(bare)
    bare.load_state_dict(source.state_dict())
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(bare(input_ids=tokens)[0], source(input_ids=tokens)[0])
