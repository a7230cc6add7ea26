"""One private step: clipped sums are collected, then released with noise.

Owns: the buffers of the clipped sums, and ``.grad``. Does not own: how gradients of samples are found
(``bookkeeping``), when a step ends (``strategies``) or what it costs (``accounting``). Knows nothing of Lightning.

DP-SGD, arXiv 1607.00133, algorithm 1, with Poisson sampling and division by the *expected* batch size:
``grad = (sum_i clip(g_i) + N(0, (noise_multiplier * sensitivity)^2)) / expected_batch_size``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_statistics import PrivateStatistics


class PrivateStep:
    """Collects the clipped sums of a logical batch and releases them.

    Guarantee: `release` writes a ``.grad`` to every trained parameter, noise included, whatever was collected:

    | logical batch | what is released |
    |---|---|
    | empty draw | noise |
    | a sample with a gradient that is not finite | the others, and noise |
    | a parameter that no sample used | noise |

    Args:
        parameters: The trained parameters, by name.
        noise: Where noise is drawn.
        mean_loss: Whether the loss is the mean over a physical batch, rather than the sum.
        statistics: Collects what is not private, if the user has asked for it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        noise: SecretRandom,
        *,
        mean_loss: bool = True,
        statistics: PrivateStatistics | None = None,
    ) -> None:
        self._parameters, self._noise, self._mean_loss = dict(parameters), noise, mean_loss
        self._statistics = statistics
        self._mechanism: Mechanism | None = None
        self._sums: dict[str, Tensor] = {}
        self._logical_batches = 0

    @property
    def num_pending(self) -> int:
        """Logical batches begun since the last release."""
        return self._logical_batches

    def begin(self, mechanism: Mechanism) -> None:
        """Begin a logical batch.

        Args:
            mechanism: Clipping, noise and expected batch size.
        """
        self._mechanism = mechanism
        self._logical_batches += 1
        if self._statistics is not None:
            self._statistics.begin(mechanism.clipping.max_grad_norm)

    @torch.no_grad()
    def collect(self, book: Book, num_real: int) -> None:
        """Clip the gradients of a physical batch and add them to the sums.

        Args:
            book: The gradients of the loss for each sample.
            num_real: The number of samples that were drawn; any further one is a phantom and adds nothing.
        """
        # The book holds gradients of the loss: of a mean, each sample's own gradient is B times as long.
        scale = book.num_samples if self._mean_loss else 1
        norm = book.norm_sq().sqrt() * scale
        if self._statistics is not None:
            self._statistics.add_norms(norm[:num_real])
        real = torch.arange(book.num_samples, device=norm.device) < num_real
        weight = torch.where(real, self._begun.clipping.factor(norm), torch.zeros_like(norm)) * scale
        book.pour(weight, self._sums)

    def note_loss(self, loss: Tensor, num_rows: int, num_real: int) -> None:
        """Note the loss of a physical batch, if the user has asked for it.

        Args:
            loss: Its mean or sum, as ``mean_loss`` says.
            num_rows: The number of its samples.
            num_real: How many of them were drawn.
        """
        if self._statistics is not None:
            self._statistics.add_loss(loss if self._mean_loss else loss / num_rows, num_real)

    @torch.no_grad()
    def release(self, names: Iterable[str] | None = None) -> None:
        """Write the noisy gradient of the logical batch to every parameter. Book it in the ledger first.

        Args:
            names: The parameters to release, if not all of them.
        """
        released = {name: self._sum_of(name) for name in (self._parameters if names is None else names)}
        self._add_noise(released.values())
        for name, noisy in released.items():
            parameter = self._parameters[name]
            parameter.grad = noisy.to(parameter)
        self.drop()

    def drop(self) -> None:
        """Forget what was collected."""
        self._sums.clear()
        self._logical_batches = 0

    @property
    def _begun(self) -> Mechanism:
        assert self._mechanism is not None, "a logical batch is begun before anything is collected or released"
        return self._mechanism

    def _sum_of(self, name: str) -> Tensor:
        """Return the clipped sum of a parameter: zeros if no sample used it."""
        parameter, clipped = self._parameters[name], self._sums.pop(name, None)
        if clipped is None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            clipped = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return clipped

    def _add_noise(self, sums: Collection[Tensor]) -> None:
        """Add the noise, and divide by the expected batch size."""
        mechanism = self._begun
        if mechanism.noise_std > 0:
            self._noise.add_normal(sums, mechanism.noise_std, mechanism.expected_batch_size)
        else:
            for clipped in sums:
                clipped.div_(mechanism.expected_batch_size)
