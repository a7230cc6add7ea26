"""The clipped sums of a logical batch: what a process holds of them, and how those of all processes become one.

Owns: the buffers, and ``.grad``. Does not own: clipping, noise or the budget (``private_step``), or what processes tell
each other (``processes``).

On W processes each adds noise of ``1 / sqrt(W)`` of the standard deviation to its own sum, from a generator of its own;
then the sums are added up. The variance of W such noises is that of one, and no process has to have all of it.
They are added up after the backward pass, even of layers that are clipped on their own: beginning inside it was tried,
and gained nothing but on a slow network (``examples/benchmarks/results.md``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book
from lightning_dp.processes import Processes


class Sums:
    """Every process holds whole sums of its own samples; they are added up once they are noisy.

    Args:
        parameters: The trained parameters, by name.
        processes: Share out the samples.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], processes: Processes) -> None:
        self._parameters, self._processes = dict(parameters), processes
        self._sums: dict[str, Tensor] = {}

    @property
    def noise_share(self) -> float:
        """Standard deviation of the noise on what `take` returns, in that of the released gradient."""
        return 1 / math.sqrt(self._processes.size)

    def pour(self, book: Book, weight: Tensor, names: Iterable[str]) -> None:
        """Add the gradients of the samples in a book, each times its weight.

        Args:
            book: Is empty afterwards.
            weight: Of every sample.
            names: The parameters that may be in it, whether any sample used them or not.
        """
        book.pour(weight, self._sums)

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return what there is for these parameters, zeros if no sample used them, and forget it."""
        return {name: self._take(name) for name in names}

    def write(self, noisy: Mapping[str, Tensor], what: str) -> None:
        """Write the gradients.

        Args:
            noisy: What `take` returned, with its share of the noise, divided by the expected batch size.
            what: Is released.

        Raises:
            PrivacyError: If other processes release something else.
        """
        self._processes.check_weights(self._parameters.values())
        self._processes.add_up(noisy.values(), what)
        for name, gradient in noisy.items():
            self._parameters[name].grad = gradient.to(self._parameters[name])

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()

    def _take(self, name: str) -> Tensor:
        parameter, clipped = self._parameters[name], self._sums.pop(name, None)
        if clipped is None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            clipped = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return clipped
