"""The errors of a recorded pass: each names the parameter and the function, and the way out.

Owns: their words. Does not own: any check.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_dp.bookkeeping.layout import Key, Layout, describe
from lightning_dp.errors import UnsupportedModelError

_LOOP = "DPStrategy(clipping_engine='loop'), one sample at a time,"


def naming(key: Key, layout: Layout, record: Callable[..., None]) -> Callable[..., None]:
    """Return a record whose errors say which function of which parameters they are about."""

    def named(*tensors: Tensor) -> None:
        try:
            record(*tensors)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"'{key[0]}' of {describe(key)} ({layout.where}): {error}") from error

    return named


def refusal(key: Key, layout: Layout) -> Callable[..., None]:
    """Return a record that raises: only a refused function whose gradient is really used is an error."""

    def record(*_: Tensor) -> None:
        raise UnsupportedModelError(
            f"'{key[0]}' of {describe(key)} ({layout.where}) has no exact per-sample gradient: {layout.reason} If "
            f"every sample has a loss of its own, {_LOOP} trains it as it is."
        )

    return record


class NotObserved(UnsupportedModelError):
    """A function ran that no observation has seen: another look at the same training step may see it."""


def unobserved(key: Key) -> NotObserved:
    """Return the error for a function that no observation has seen."""
    return NotObserved(
        f"'{key[0]}' of {describe(key)} was not used when the model was observed, so it is not known where the samples "
        "lie in it; nor was it when the training step was observed again for a few samples. Let branches of the "
        "training step depend on the step, not on the samples. What "
        f"torch.vmap, torch.func.jvp and the like run cannot be observed: write it for a batch, or use {_LOOP} instead."
    )


def escaped(name: str, where: str) -> UnsupportedModelError:
    """Return the error for a gradient that autograd computed past the book.

    Args:
        name: The parameter.
        where: The functions that it was seen to enter.
    """
    seen = f" (perhaps one of: {where})" if where else ""
    return UnsupportedModelError(
        f"parameter '{name}' received a gradient that is not in the book: it enters an operation{seen} {_UNSEEN}"
    )


def opaque(name: str, operation: str) -> UnsupportedModelError:
    """Return the error for a parameter that enters an operation which is named."""
    return UnsupportedModelError(f"parameter '{name}' enters {operation} {_UNSEEN}")


_UNSEEN = (
    "that torch does not let us see, such as a torch.autograd.Function, a ScriptModule, a compiled module, torch.vmap, "
    "a function of nested (jagged) tensors or an extension in C++ or CUDA; or a view of a tensor that it was written "
    "into. Freeze it (requires_grad_(False)), write the operation in torch functions, let it be seen by "
    "lightning_dp.register_rule, or train it without the book, one sample at a time: "
    "DPStrategy(clipping_engine='loop')."
)


def inner_gradient(of: str) -> UnsupportedModelError:
    """Return the error for a gradient that is taken inside the training step and goes into the loss."""
    return UnsupportedModelError(
        f"the training step differentiates with respect to {of} in a way that goes into the loss (torch.autograd.grad, "
        "or create_graph=True for a gradient penalty): the parameters' share of it has no per-sample gradient here. "
        "Detach the inner gradient, leave it out of the loss, or train without the book, one sample at a time: "
        "DPStrategy(clipping_engine='loop')."
    )


def written_in_place(key: Key) -> UnsupportedModelError:
    """Return the error for a function that writes into a function of parameters."""
    return UnsupportedModelError(
        f"'{key[0]}' writes in place, with {describe(key)} in its arguments, in a way that has no per-sample gradient: "
        "use the function that returns a new tensor."
    )


def overwritten(key: Key) -> UnsupportedModelError:
    """Return the error for a function of parameters that was used, then written into through a view or a copy of it."""
    return UnsupportedModelError(
        f"'{key[0]}' of {describe(key)} shares memory with a tensor that was written in place and is used besides: its "
        "gradient before and after cannot be told apart. Use functions that return a new tensor."
    )


def kept_from_before(key: Key) -> UnsupportedModelError:
    """Return the error for a function of parameters that was computed in an earlier pass."""
    return UnsupportedModelError(
        f"'{key[0]}' of {describe(key)} was computed in an earlier pass and is used again in this one, where its "
        "gradient would be lost: compute it anew in every training step."
    )


def no_gradient() -> UnsupportedModelError:
    """Return the error for a pass without a backward pass."""
    return UnsupportedModelError(
        "no gradient came back to any trained parameter: there was no backward pass of the loss between recording() "
        "and close(), or one with an `inputs` argument, which names other tensors only."
    )


def closed_before() -> UnsupportedModelError:
    """Return the error for a second backward pass."""
    return UnsupportedModelError(
        "a backward pass ran through a forward pass whose book was closed: its gradient would be lost. Call backward() "
        "once for every forward pass."
    )
