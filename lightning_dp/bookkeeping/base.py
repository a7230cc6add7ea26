"""What a strategy needs of anything that finds per-sample gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import nn

from lightning_dp.bookkeeping.book import Book
from lightning_dp.bookkeeping.observation import Forward
from lightning_dp.errors import UnsupportedModelError


class Keeping(ABC):
    """Finds the gradients of the trained parameters for every sample of a batch.

    Args:
        trained: The parameters whose gradients are kept, by name.
        others: Further parameters that require a gradient but are not trained: they are treated as constants.

    Raises:
        UnsupportedModelError: If a trained parameter is complex.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], others: Mapping[str, nn.Parameter] | None = None) -> None:
        self._trained, self._others = dict(trained), dict(others or {})
        for name, parameter in trained.items():
            if parameter.is_complex():
                raise UnsupportedModelError(
                    f"parameter '{name}' is complex ({parameter.dtype}): norms and noise are those of real numbers. "
                    "Hold its real and imaginary parts in a real parameter p and use torch.view_as_complex(p)."
                )

    def trains(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether the trained parameters are exactly these, under these names; pruning gives them others."""
        return {n: id(p) for n, p in parameters.items()} == {n: id(p) for n, p in self._trained.items()}

    @abstractmethod
    def observe(self, forward: Forward, varied: bool = True, rows: int = 1) -> None:
        """Learn what must be known of the model before the first pass.

        Args:
            forward: Runs the forward pass on the samples named by a string: ``"aab"`` is a batch ``[a, a, b]``.
            varied: Whether ``a`` and ``b`` differ.
            rows: How many rows of a batch a sample is.
        """

    @abstractmethod
    def recording(self, num_samples: int | None = None) -> AbstractContextManager[None]:
        """Record what runs inside: the forward pass of ``num_samples`` samples, or its backward pass without it."""

    @abstractmethod
    def close(self) -> Book:
        """End the pass and return its book; no parameter has a ``.grad`` then."""

    @abstractmethod
    def abandon(self) -> None:
        """Drop an unfinished pass."""
