"""What a torch function is, by its name, its arguments and what it returns.

Owns: which functions are never differentiated or write in place, and the leaves and outputs that count. Does not own:
how functions are seen (``interception``), or what is done with them (``recorder``, ``tracing``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_dp.errors import UnsupportedModelError

_NOT_DIFFERENTIATED = {
    "__deepcopy__", "__format__", "__reduce_ex__", "__repr__", "__set__", "detach", "is_shared", "numpy", "pin_memory",
    "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "share_memory_",
}  # fmt: skip

_DIFFERENTIABLE_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}

_IN_PLACE_OPERATORS = {
    f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__setitem__"}

_LIKE_OTHER = {"expand_as", "reshape_as", "to", "type_as", "view_as"}

_CONTAINERS = (list, tuple, dict)

_NUMBERS = {int, float, bool}


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
