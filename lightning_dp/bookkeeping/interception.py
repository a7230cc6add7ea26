"""Seeing the torch functions that a trainable parameter enters, and nothing else.

Owns: the swap of a parameter's class and the identity (`Tap`) that receives an output gradient. Does not own: what is
done with a function that was seen (``recorder``, ``observation``).

PyTorch swaps the class of a parameter itself (``UninitializedParameter.materialize``). The swap is not thread-local,
so the recomputation of activation checkpointing in a backward thread is seen too. Outside the ``with`` block of
`swapped` every parameter has its own class again: nothing is left on the user's module.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_dp.bookkeeping.precision import without_autocast
from lightning_dp.errors import UnsupportedModelError

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

without_interception = torch._C.DisableTorchFunctionSubclass
"""Context in which torch functions run as if no class had been swapped."""


def uncompiled() -> AbstractContextManager[None]:
    """Run what ``torch.compile`` compiled as it was written.

    A compiled function would trace the book-keeping along with the model, break its graph at every parameter and be
    compiled again for every swap.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


_CASTS = {Tensor.to, Tensor.type_as}

_COMPOSITES = {F.multi_head_attention_forward}
"""Functions written in Python over functions with rules: stepped into, so that only their parts are seen."""


def intercepting(base: type[Tensor], handler: Handler) -> type[Tensor]:
    """Return a subclass of ``base`` whose torch functions go to ``handler(function, args, kwargs)``."""

    def __torch_function__(  # noqa: N807
        cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _COMPOSITES:
            return _without_own_override(func)(*args, **(kwargs or {}))
        if func is Tensor.__iter__:  # returns no tensor; its parts are seen as those of unbind
            return iter(args[0].unbind(0))
        if func in _CASTS and len(args) > 1 and isinstance(args[1], Tensor):  # of which only dtype and device count
            return args[0].to(args[1].device, args[1].dtype, *args[2:], **(kwargs or {}))
        return handler(func, args, kwargs or {})

    namespace = {"__torch_function__": classmethod(__torch_function__), "__module__": __name__, "is_swapped": True}
    metaclass: Any = type(base)
    made: type[Tensor] = metaclass(f"Seen{base.__name__}", (base,), namespace)
    return made


@contextmanager
def swapped(
    parameters: Iterable[tuple[str, nn.Parameter]], class_for: Callable[[str, type], type]
) -> Iterator[Callable[[str, nn.Parameter], None]]:
    """Give every parameter the class ``class_for(name, its class)`` and its own class back at the end.

    Args:
        parameters: The parameters with their names, each once.
        class_for: Returns the class, or raises if there is none.

    Yields:
        What swaps the class of a further parameter, until the end.

    Raises:
        UnsupportedModelError: If a parameter has a hook.
    """
    originals: list[tuple[nn.Parameter, type]] = []
    base: type | None = None
    other: type = nn.Parameter

    def swap(name: str, parameter: nn.Parameter) -> None:
        nonlocal base, other
        own = type(parameter)
        if own is not base:  # mostly all have one class
            base, other = own, class_for(name, own)
        if parameter._backward_hooks:
            raise UnsupportedModelError(
                f"parameter '{name}' has a gradient hook (register_hook), which would never run: no gradient of "
                "the whole batch is computed for it. Remove the hook, and change the loss or freeze instead."
            )
        originals.append((parameter, own))
        parameter.__class__ = other

    try:
        for name, parameter in parameters:
            swap(name, parameter)
        with uncompiled():
            yield swap
    finally:
        for parameter, own in originals:
            parameter.__class__ = own


@contextmanager
def unswapped(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Give parameters that are swapped their own classes inside, and the swapped ones back at the end."""
    seen: list[tuple[nn.Parameter, Any]] = [(parameter, type(parameter)) for _, parameter in parameters]
    for parameter, swapped_class in seen:
        parameter.__class__ = swapped_class.__base__
    try:
        yield
    finally:
        for parameter, swapped_class in seen:
            parameter.__class__ = swapped_class


def is_swapped(t: Any) -> bool:
    """Whether the functions that a tensor enters are seen."""
    return getattr(type(t), "is_swapped", False)


def check_swappable(name: str, own: type[nn.Parameter]) -> None:
    """Raise if the functions that a parameter of a class enters cannot be seen.

    Raises:
        UnsupportedModelError: If it is not initialised yet or has a ``__torch_function__`` of its own.
    """
    if issubclass(own, UninitializedTensorMixin):
        raise UnsupportedModelError(
            f"parameter '{name}' is not initialised yet ({own.__name__}): run one forward pass of the lazy module "
            "before the fit, for example in configure_model()."
        )
    if own.__torch_function__ is not nn.Parameter.__torch_function__:
        raise UnsupportedModelError(
            f"parameter '{name}' is a {own.__name__} with a __torch_function__ of its own, so the functions that it "
            "enters cannot be seen: freeze it (requires_grad_(False)) or make it a plain torch.nn.Parameter."
        )


class Anchor:
    """A leaf that stands for the trained parameters in the graph of autograd.

    Attributes:
        leaf: The leaf: what is made of it requires a gradient.
    """

    def __init__(self) -> None:
        self.leaf = torch.zeros((), requires_grad=True)
        self._node = torch.autograd.graph.get_gradient_edge(self.leaf).node

    def is_wanted(self) -> bool:
        """Whether the backward pass that runs now would accumulate into the parameters."""
        wanted: bool = torch._C._will_engine_execute_node(self._node)  # type: ignore[attr-defined]
        return wanted


class Tap(torch.autograd.Function):
    """The identity on the outputs of one function; hands their gradients to ``record`` in the backward pass.

    What ``record`` needs of the forward pass goes through ``save_for_backward``, so that activation checkpointing can
    drop and recompute it. The leaf of an `Anchor` makes the outputs require a gradient; ``wanted`` tells whether this
    backward pass, which must be one without a graph of its own, would accumulate into the parameters.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        wanted: Callable[[], bool],
        record: Callable[..., None],
        num_outputs: int,
        anchor: Tensor,
        *tensors: Tensor,
    ) -> Any:
        """Return the first ``num_outputs`` tensors, and save the others."""
        outputs, saved = tensors[:num_outputs], tensors[num_outputs:]
        ctx.wanted, ctx.record, ctx.num_saved = wanted, record, len(saved)
        ctx.save_for_backward(*saved)
        # detach(), not view_as(): the result is no view, so that in-place activations may follow, and it shares the
        # version counter, so that autograd still notices when they overwrite what somebody saved.
        taps = tuple(t.detach() for t in outputs)
        return taps[0] if num_outputs == 1 else taps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Hand on the gradients, and to ``record``."""
        if ctx.wanted():
            saved = ctx.saved_tensors  # may recompute a checkpointed forward pass, which must be seen
            with without_autocast(), without_interception():
                ctx.record(*gradients, *saved)
        return (None, None, None, None, *gradients, *[None] * ctx.num_saved)


@functools.cache
def _without_own_override(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same Python function with its own override check switched off."""
    scope = dict(func.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
