"""Zero biases for layers that have none: what "BiTFiT-Add" trains (arXiv 2210.00036).

Owns: which layers get a bias, and the proof that it takes part. Does not own: what is trained (``callbacks``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves

from lightning_dp.bookkeeping.random_state import RandomState, replaying
from lightning_dp.errors import PrivacyConfigurationError


@dataclass(frozen=True)
class AddedBiases:
    """What was added to a module.

    Args:
        added: The names of the new parameters.
        left_out: The layers without a bias that got none, each with its class: they would not use it.
    """

    added: tuple[str, ...]
    left_out: tuple[str, ...]


Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class _Kind:
    """A class of layers that may have a bias.

    Args:
        layer: The class.
        size: Returns the shape of the bias of such a layer.
        inputs: Returns shapes of inputs that such a layer may take, to be tried in turn.
        name: That of the bias.
    """

    layer: type[nn.Module]
    size: Callable[[Any], Iterable[int]]
    inputs: Callable[[Any], list[Shapes]]
    name: str = "bias"


def _extent(conv: Any) -> list[int]:
    """Return the sizes of a small image that a convolution may take."""
    padding = [0] * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    sizes = zip(conv.kernel_size, conv.dilation, padding, strict=True)
    return [max(d * (k - 1), 2 * p) + 1 for k, d, p in sizes]


def _images(batch_size: int, shape: Iterable[int]) -> list[Shapes]:
    """Return inputs of a normalisation, in no to three dimensions."""
    return [[(batch_size, *shape, *[2] * k)] for k in range(4)]


_KINDS = (
    _Kind(nn.Linear, lambda m: [m.out_features], lambda m: [[(1, m.in_features)]]),
    _Kind(nn.Bilinear, lambda m: [m.out_features], lambda m: [[(1, m.in1_features), (1, m.in2_features)]]),
    _Kind(_ConvNd, lambda m: [m.out_channels], lambda m: [[(1, m.in_channels, *_extent(m))]]),
    _Kind(nn.LayerNorm, lambda m: m.normalized_shape, lambda m: _images(1, m.normalized_shape)),
    _Kind(nn.GroupNorm, lambda m: [m.num_channels], lambda m: _images(2, [m.num_channels])),
    _Kind(_NormBase, lambda m: [m.num_features], lambda m: _images(2, [m.num_features])),
    _Kind(nn.MultiheadAttention, lambda m: [3 * m.embed_dim], lambda m: [[(1, 1, m.embed_dim)] * 3], "in_proj_bias"),
)


def add_missing_biases(module: nn.Module) -> AddedBiases:
    """Add a zero bias to every linear, convolution and normalisation layer and attention that has none.

    The function of the module stays as it is: to the last bit where torch computes the same with a bias, as mostly on a
    CPU, and up to rounding where it has another kernel for that (normalisations without a scale, perhaps a GPU). The
    state dict gets the new parameters under the names that these layers use themselves (``bias``, ``in_proj_bias``).
    Subclasses count if a gradient reaches the bias in their own ``forward``, which is tried on made-up inputs; the
    others, and layers whose class knows no bias, such as ``RMSNorm``, are left as they are, and returned. A second call
    adds nothing.

    This makes room for weights that were trained so in a module made without them: where its layers cannot be made with
    ``bias=True``, call it before ``load_state_dict``. ``load_state_dict(strict=False)`` and ``from_pretrained`` of
    transformers would leave trained biases out, which is another function.

    Args:
        module: Changed in place.

    Returns:
        What was added, and which layers were left out.

    Raises:
        PrivacyConfigurationError: If a parameter is not initialised yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.RMSNorm(4))
        >>> add_missing_biases(model)
        AddedBiases(added=('0.bias',), left_out=("RMSNorm '1'",))
    """
    check_initialised(module)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    added, left_out = [], []
    for name, layer in module.named_modules():
        kind = next((k for k in _KINDS if isinstance(layer, k.layer)), None)
        label = kind.name if kind else "bias"
        present = getattr(layer, label, None)
        if isinstance(present, Tensor) or not (kind or _is_normalisation(layer)):
            continue
        bias = _bias_for(layer, kind, like) if kind and present is None else None
        if bias is None:
            left_out.append(f"{type(layer).__name__} '{name}'")
        else:
            setattr(layer, label, bias)
            added.append(f"{name}.{label}" if name else label)
    return AddedBiases(tuple(added), tuple(left_out))


def check_initialised(module: nn.Module) -> None:
    """Raise if a lazy module has not made its parameters yet.

    Raises:
        PrivacyConfigurationError: Then.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedTensorMixin):
            raise PrivacyConfigurationError(
                f"parameter '{name}' is not initialised yet ({type(parameter).__name__}), so it is not known which "
                "biases there are. Run one forward pass of the lazy module in configure_model()."
            )


def _is_normalisation(layer: nn.Module) -> bool:
    """Whether a layer of unknown class is a normalisation with a scale, of which somebody may expect a bias."""
    return "norm" in type(layer).__name__.lower() and "weight" in dict(layer.named_parameters(recurse=False))


def _bias_for(layer: nn.Module, kind: _Kind, like: Tensor) -> nn.Parameter | None:
    """Return a zero bias, or none if the layer would not use it."""
    own = next((t for t in (getattr(layer, "weight", None), *layer.parameters()) if isinstance(t, Tensor)), like)
    if not own.is_floating_point():
        return None
    bias = nn.Parameter(torch.zeros(list(kind.size(layer)), dtype=own.dtype, device=own.device))
    return bias if _computes_what_torch_does(layer) or _reaches(layer, kind, bias) else None


def _computes_what_torch_does(layer: nn.Module) -> bool:
    """Whether the forward pass is torch's own, of which is known that it uses the bias."""
    methods = [getattr(type(layer), name, None) for name in ("forward", "_conv_forward")]
    own = all(m is None or m.__module__.startswith("torch.nn.modules.") for m in methods)
    return own and "forward" not in vars(layer)


def _reaches(layer: nn.Module, kind: _Kind, bias: nn.Parameter) -> bool:
    """Whether a bias takes part in the layer's forward pass, and zeros change nothing there."""
    for shapes in kind.inputs(layer):
        try:
            before, after = _tried(layer, {}, shapes, bias), _tried(layer, {kind.name: bias}, shapes, bias)
            (g,) = torch.autograd.grad([t.sum() for t in after if t.requires_grad], [bias], allow_unused=True)
            if g is None or bias.is_meta:
                return g is not None
            torch.testing.assert_close(after, before, equal_nan=True)
            return bool((g != 0).any())
        except Exception:  # whatever a forward pass that is not ours raises, on an input that is made up
            continue
    return False


def _tried(layer: nn.Module, biases: dict[str, nn.Parameter], shapes: Shapes, like: Tensor) -> list[Tensor]:
    """Return the outputs of a layer with other parameters; hooks do not run, and it keeps nothing of it."""
    twin = object.__new__(type(layer))
    twin.__dict__ = {name: value for name, value in vars(layer).items() if name not in biases}
    twin._parameters = {**layer._parameters, **biases}
    twin._buffers = {name: None if t is None else t.clone() for name, t in layer._buffers.items()}
    sizes = [torch.Size(shape) for shape in shapes]
    inputs = [torch.linspace(-1, 1, s.numel(), dtype=like.dtype, device=like.device).view(s) for s in sizes]
    with torch.enable_grad(), replaying(RandomState.now()):
        return [t for t in tree_leaves(twin.forward(*inputs)) if isinstance(t, Tensor) and t.is_floating_point()]
