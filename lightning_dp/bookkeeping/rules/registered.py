"""Operations that torch hides, and that their author lets us see.

Owns: the registration. Does not own: what is done with an operation that is seen (``recorder``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten

from lightning_dp.bookkeeping.entries import Dense
from lightning_dp.bookkeeping.operation import Operation, Recording, Rule
from lightning_dp.errors import UnsupportedModelError

PerSampleGradients = Callable[..., Sequence["Tensor | None"]]

T = TypeVar("T", bound=Callable[..., Any])

REGISTERED: dict[Callable[..., Any], Rule] = {}
"""The rules of operations that were registered with one."""

_SEEN: set[Any] = set()


def register_rule(operation: T, per_sample_gradients: PerSampleGradients | None = None) -> T:
    """Let an operation that torch hides take part in private training, on trained parameters.

    Needed for a ``torch.autograd.Function``, or a Python function that calls a kernel of one's own, where a trained
    parameter enters it. The gradient of every sample then comes from the operation's own backward pass, run once for
    each sample; or, faster, from ``per_sample_gradients``. Either is checked against autograd before the first step.

    Args:
        operation: A subclass of ``torch.autograd.Function`` (its ``apply`` is seen from then on; that of its own
            subclasses is not), or a differentiable function (the function that is returned is seen, in the place of the
            given one).
        per_sample_gradients: ``per_sample_gradients(output_gradient, *args)``, with the arguments of the operation,
            returns for each argument ``None`` or its gradients, shape ``[B, *argument.shape]`` for B samples: those of
            trained parameters are used. The output gradient has the shape of the output, one tensor for each output.

    Returns:
        The class, or the function to call: so it can be used as a decorator.

    Raises:
        TypeError: If the operation is neither.

    Guarantee: none on its own; wrong gradients are refused by the self-check, unless that is switched off.

    Example:
        >>> class Scale(torch.autograd.Function): ...  # x * weight, in a kernel of one's own  # doctest: +SKIP
        >>> register_rule(Scale, lambda g, x, weight: (None, g * x))  # x of shape [B, d]  # doctest: +SKIP
    """
    if isinstance(operation, type) and issubclass(operation, torch.autograd.Function):
        seen: Any = _seen(operation.apply)
        operation.apply = _Apply(operation, seen)  # type: ignore[method-assign, assignment]
        result: Any = operation
    elif callable(operation) and not isinstance(operation, type):
        result = seen = _seen(operation)
    else:
        raise TypeError(
            f"register_rule got {operation!r}: expected a subclass of torch.autograd.Function, or a function."
        )
    _SEEN.add(seen)
    if per_sample_gradients is not None:
        REGISTERED[seen] = _rule(per_sample_gradients)
    return result


def is_registered(function: Callable[..., Any]) -> bool:
    """Whether a function is seen because its author registered it."""
    return function in _SEEN


class _Apply:
    """The ``apply`` of a registered class; its subclasses, which may compute something else, keep their own."""

    def __init__(self, owner: type, seen: Callable[..., Any]) -> None:
        self._owner, self._seen = owner, seen

    def __get__(self, instance: Any, cls: type) -> Any:
        return self._seen if cls is self._owner else super(self._owner, cls).apply  # type: ignore[misc, arg-type]


def _seen(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operation, with torch's own protocol for functions that subclasses of tensors may override."""

    @functools.wraps(operation)
    def seen(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if has_torch_function(tensors):
            return handle_torch_function(seen, tensors, *args, **kwargs)
        return operation(*args, **kwargs)

    return seen


def _rule(per_sample_gradients: PerSampleGradients) -> Rule:
    def rule(operation: Operation, *args: Any, **kwargs: Any) -> Recording | None:
        if kwargs or any(axis is None for axis in operation.layout.outputs):
            return None
        files = [operation.filing(arg) for arg in args]
        saved_at = [k for k, arg in enumerate(args) if isinstance(arg, Tensor)]
        shapes = [arg.shape if isinstance(arg, Tensor) else None for arg in args]
        constants = [None if isinstance(arg, Tensor) else arg for arg in args]

        def record(*tensors: Tensor) -> None:
            count = len(tensors) - len(saved_at)
            values = list(constants)
            for at, value in zip(saved_at, tensors[count:], strict=True):
                values[at] = value
            gradients = per_sample_gradients(*tensors[:count], *values)
            _check(operation.func, gradients, shapes)
            for file, gradient in zip(files, gradients, strict=True):
                if file is not None and gradient is not None:
                    file(Dense(gradient))

        return record, [operation.plain(args[k]) for k in saved_at]

    return rule


def _check(operation: Any, gradients: Any, shapes: Sequence[torch.Size | None]) -> None:
    found = [getattr(g, "shape", None) for g in gradients] if isinstance(gradients, Sequence) else [gradients]
    fits = len(found) == len(shapes) and all(
        a is None or b is None or a[1:] == b for a, b in zip(found, shapes, strict=True)
    )
    if not fits:
        raise UnsupportedModelError(
            f"the per_sample_gradients that '{operation.__name__}' was registered with returned "
            f"{[None if a is None else tuple(a) for a in found]}: expected for each of its {len(shapes)} arguments "
            f"None or gradients of shape [B, *argument.shape], with argument shapes "
            f"{[None if b is None else tuple(b) for b in shapes]}."
        )
