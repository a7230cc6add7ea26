"""One private step: clipped sums are collected, then released with noise.

Owns: which factor clips what, and the noise. Does not own: how gradients of samples are found (``bookkeeping``), where
sums are kept and added up (``sums``), when a step ends (``strategies``), what it costs (``accounting``). Knows nothing
of Lightning.

DP-SGD, arXiv 1607.00133, algorithm 1, with Poisson sampling and division by the *expected* batch size:
``grad = (sum_i clip(g_i) + N(0, (noise_multiplier * sensitivity)^2)) / expected_batch_size``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_dp.bookkeeping import Book
from lightning_dp.clipping import NormClipping, Part, checked_parts
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.private_statistics import PrivateStatistics
from lightning_dp.processes import Processes
from lightning_dp.quantile_bound import QuantileBound
from lightning_dp.sharded_sums import sums_of


class PrivateStep:
    """Collects the clipped sums of a logical batch and releases them.

    Guarantee: `release` writes a ``.grad`` to every trained parameter, noise included, whatever was collected:

    | logical batch | what is released |
    |---|---|
    | empty draw | noise |
    | a sample with a gradient that is not finite | the others, and noise; per group, where groups are clipped |
    | a parameter that no sample used | noise |
    | a process without samples | those of the other processes, and noise |

    Args:
        parameters: The trained parameters, by name.
        noise: Where noise is drawn.
        mean_loss: Whether the loss is the mean over a physical batch, rather than the sum.
        statistics: Collects what is not private, if the user has asked for it.
        bound: Moves the bound of `AdaptiveClipping`; without one it stays where it is.
        processes: Share out the samples of a logical batch.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        noise: SecretRandom,
        *,
        mean_loss: bool = True,
        statistics: PrivateStatistics | None = None,
        bound: QuantileBound | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._parameters, self._noise, self._mean_loss = dict(parameters), noise, mean_loss
        self._statistics, self._bound, self._processes = statistics, bound, processes or Processes()
        self._mechanism: Mechanism | None = None
        self._parts: Sequence[Part] = ()
        self._sums = sums_of(self._parameters, self._processes)
        self._logical_batches = self._at = self._released = 0

    @property
    def num_pending(self) -> int:
        """Logical batches begun since the last release."""
        return self._logical_batches

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each coordinate of the gradients that the last release wrote."""
        return self._begun.noise_std / self._begun.expected_batch_size

    def begin(self, mechanism: Mechanism, at: int = 0) -> None:
        """Begin a logical batch.

        Args:
            mechanism: Clipping, noise and expected batch size.
            at: Which one of the run: all processes must release the same one.
        """
        self._at, self._released = at, 0
        if self._bound is not None:
            mechanism = self._bound.begin(mechanism)
        before, self._mechanism = self._mechanism, mechanism
        clipping = mechanism.clipping
        if not isinstance(clipping, NormClipping) and (before is None or before.clipping is not clipping):
            self._parts = checked_parts(clipping, {name: p.numel() for name, p in self._parameters.items()})
        self._logical_batches += 1
        if self._statistics is not None:
            self._statistics.begin()

    @torch.no_grad()
    def collect(self, book: Book, num_real: int) -> None:
        """Clip the gradients of a physical batch and add them to the sums.

        Args:
            book: The gradients of the loss for each sample.
            num_real: The number of samples that were drawn; any further one is a phantom and adds nothing.
        """
        # The book holds gradients of the loss: of a mean, each sample's own gradient is B times as long.
        scale = book.num_samples if self._mean_loss else 1
        norms = [self._add(*share, scale, num_real) for share in self._shares(book)]
        if self._statistics is not None:
            self._statistics.add_norms(*norms)
        if self._bound is not None:
            self._bound.add(norms[0][0])

    def _shares(self, book: Book) -> Iterator[tuple[Book, Iterable[str], NormClipping]]:
        """Yield what is clipped by one factor, as a rule the whole book, and the parameters that may be in it."""
        clipping = self._begun.clipping
        if isinstance(clipping, NormClipping):
            yield book, self._parameters, clipping
            return
        for part in self._parts:
            yield book.take(part.names), part.names, part.clipping

    def _add(
        self, book: Book, names: Iterable[str], clipping: NormClipping, scale: int, num_real: int
    ) -> tuple[Tensor, float]:
        """Add what is in a book to the sums, clipped; return the norms of the drawn samples, and their bound."""
        norm = book.norm_sq().sqrt() * scale
        weight = clipping.factor(norm) * scale
        if num_real < book.num_samples:
            weight[num_real:] = 0  # phantoms
        self._sums.pour(book, weight, names)
        return norm[:num_real], clipping.max_grad_norm

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

        Raises:
            PrivacyError: If other processes release something else.
        """
        released = self._sums.take(self._parameters if names is None else names)
        self._add_noise(released.values())
        self._sums.write(released, self._next_release(released))
        if self._bound is not None:
            self._bound.move(self._noise, self._processes)
        if self._statistics is not None:
            self._statistics.join(self._processes)
        self.drop()

    def drop(self) -> None:
        """Forget what was collected."""
        self._sums.clear()
        self._logical_batches = 0

    def _next_release(self, names: Iterable[str]) -> str:
        """Say what is released: which step, which time in it, and of which parameters."""
        self._released += 1
        return f"{self._at} {self._released} {' '.join(names)}"

    @property
    def _begun(self) -> Mechanism:
        assert self._mechanism is not None, "a logical batch is begun before anything is collected or released"
        return self._mechanism

    def _add_noise(self, sums: Collection[Tensor]) -> None:
        """Add this process's share of the noise, and divide by the expected batch size."""
        mechanism = self._begun
        if mechanism.noise_std > 0:
            std = mechanism.noise_std * self._sums.noise_share
            self._noise.add_normal(sums, std, mechanism.expected_batch_size)
        else:
            for clipped in sums:
                clipped.div_(mechanism.expected_batch_size)
