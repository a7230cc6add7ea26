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
from torch.utils._pytree import tree_leaves, tree_map

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


_NOT_DIFFERENTIATED = {
    "__deepcopy__", "__format__", "__reduce_ex__", "__repr__", "__set__", "detach", "is_shared", "numpy", "pin_memory",
    "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "share_memory_",
}  # fmt: skip

_DIFFERENTIABLE_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}

_IN_PLACE_OPERATORS = {
    f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__setitem__"}

_LIKE_OTHER = {"expand_as", "reshape_as", "to", "type_as", "view_as"}

_CASTS = {Tensor.to, Tensor.type_as}

_CONTAINERS = (list, tuple, dict)

_NUMBERS = {int, float, bool}

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


@functools.lru_cache(maxsize=1000)
def function_name(func: Callable[..., Any]) -> str | None:
    """Return the name of a torch function; ``None`` if it is never differentiated (``p.shape``, ``p.detach()``)."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name in _NOT_DIFFERENTIATED:
        return None
    if name == "__get__":
        attribute: str = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in _DIFFERENTIABLE_ATTRIBUTES else None
    return name


def flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the leaves of the arguments of a function, in a fixed order."""
    leaves: list[Any] = []
    for leaf in (*args, *kwargs.values()):
        if not isinstance(leaf, _CONTAINERS):
            leaves.append(leaf)
        elif _holds_numbers(leaf):  # many functions are given a shape, and a tree takes ten times as long
            leaves += leaf
        else:
            return tree_leaves((args, kwargs))
    return leaves


def _holds_numbers(leaf: Any) -> bool:
    return type(leaf) in (tuple, list) and _NUMBERS.issuperset(map(type, leaf))


def _is_nested(leaves: Iterable[Any]) -> bool:
    """Whether there is a container that may hold a tensor."""
    # no any() here nor below: making a generator takes longer than looking at three arguments
    for leaf in leaves:  # noqa: SIM110
        if isinstance(leaf, _CONTAINERS) and not _holds_numbers(leaf):
            return True
    return False


def map_leaves(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with every leaf changed, of which ``change`` leaves alone what is no tensor."""
    if _is_nested(args) or (kwargs and _is_nested(kwargs.values())):
        return tree_map(change, args), tree_map(change, kwargs)
    return tuple([change(leaf) for leaf in args]), {name: change(leaf) for name, leaf in kwargs.items()}


def float_outputs(result: Any) -> tuple[Tensor, ...]:
    """Return the outputs of a function that can have a gradient: real and complex ones."""
    if isinstance(result, Tensor):
        return (result,) if _is_float(result) else ()
    return tuple(filter(_is_float, result)) if isinstance(result, tuple | list) else ()


def with_float_outputs(result: Any, replacements: Iterable[Tensor]) -> Any:
    """Return ``result`` with the tensors that `float_outputs` names replaced."""
    fresh = iter(replacements)
    if not isinstance(result, tuple | list):
        return next(fresh)
    return type(result)([next(fresh) if _is_float(t) else t for t in result])


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def check_outputs(name: str, result: Any) -> None:
    """Raise if a function returns tensors that `float_outputs` does not name: they would lose their parameter.

    Raises:
        UnsupportedModelError: If outputs are nested in one another.
    """
    if isinstance(result, Tensor):
        return
    known = {id(t) for t in float_outputs(result)}
    if any(_is_float(t) and id(t) not in known for t in tree_leaves(result)):
        raise UnsupportedModelError(
            f"'{name}' of a trained parameter has nested outputs, through which no per-sample gradient is found: "
            "freeze the parameter, or use functions that return plain tensors."
        )


def reads_metadata(name: str, first_is_trained: bool) -> bool:
    """Whether a function only asks its trained arguments for a shape, a dtype or a device."""
    return name.startswith("new_") or (not first_is_trained and name in _LIKE_OTHER)


def is_in_place(name: str) -> bool:
    """Whether the function writes into its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


@functools.cache
def out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that leaves its first argument alone and returns what ``func`` would have made of it."""

    def twin(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = first.clone()
        func(result, *args, **kwargs)
        return result

    return twin


@functools.cache
def _without_own_override(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same Python function with its own override check switched off."""
    scope = dict(func.__globals__, has_torch_function=lambda *_: False)
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
