"""The bound of adaptive clipping as it is now, and its steps.

Owns: the count of a logical batch, its noise, and what follows for the bound. Does not own: the arguments, and what is
left of the noise for the gradient (``clipping.adaptive``), or the gradient's own release (``private_step``).

Andrew et al., arXiv 1905.03871, algorithm 1: ``C <- C exp(-learning_rate (b - quantile))``, for the share b of samples
whose norm is at most C. Each sample adds 1/2 or -1/2 to a count, so that one sample moves it by 1/2 only, and
``b = (count + N(0, z_b^2)) / expected_batch_size + 1/2``; the division is never by the number drawn, which is private.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.clipping import AdaptiveClipping
from lightning_dp.clipping.adaptive import COUNT_SENSITIVITY
from lightning_dp.errors import PrivacyError
from lightning_dp.mechanism import Mechanism
from lightning_dp.noise import SecretRandom
from lightning_dp.processes import Processes

_SMALLEST, _LARGEST = 1e-20, 1e20
"""The bound stays within these, whatever the noise: its square is then a number in float32."""


class QuantileBound:
    """Moves the bound by one count for each release.

    Guarantee: gradient and count of a step together tell as much as one gradient with the mechanism's noise multiplier.
    The bound of a step depends on counts of earlier steps alone, with their noise: it is one number for all physical
    batches of a draw, and may be shown.

    | logical batch | what the bound does |
    |---|---|
    | empty draw | moves by noise, as if half of the samples had shorter gradients |
    | a sample with a gradient that is not finite | counts as longer |
    | noise multiplier 0 | moves by the exact share: nothing is private then |

    Args:
        clipping: The arguments, with the bound of the first step.
    """

    def __init__(self, clipping: AdaptiveClipping) -> None:
        self.clipping = clipping
        self._mechanism: Mechanism | None = None
        self._counts: list[Tensor] = []

    def begin(self, mechanism: Mechanism) -> Mechanism:
        """Begin a logical batch, and return its mechanism with the bound as it is now."""
        self._counts.clear()
        self._mechanism = replace(mechanism, clipping=self.clipping)
        return self._mechanism

    def add(self, norm: Tensor) -> None:
        """Count drawn samples by the norms of their gradients: ``[B]``, before clipping, not squared."""
        below = (norm <= self.clipping.max_grad_norm).double()
        self._counts.append(((2 * below - 1) * COUNT_SENSITIVITY).sum().view(1))

    def move(self, noise: SecretRandom, processes: Processes | None = None) -> None:
        """Release the count of the logical batch, and move the bound for the next one.

        Args:
            noise: Where noise is drawn.
            processes: Each has counted its own samples; the bound is the same in all of them afterwards.
        """
        together = processes or Processes()
        mechanism, clipping = self._mechanism, self.clipping
        assert mechanism is not None, "a logical batch is begun before anything is released"
        count = torch.cat([count.cpu() for count in self._counts]).sum().view(1) if self._counts else torch.zeros(1)
        count = count.double()
        std = clipping.count_noise(mechanism.noise_multiplier, mechanism.expected_batch_size)
        if std > 0:
            noise.add_normal([count], std / math.sqrt(together.size))
        together.add_up([count])
        self._counts.clear()
        share = float(count) / mechanism.expected_batch_size + COUNT_SENSITIVITY
        exponent = -clipping.learning_rate * (share - clipping.quantile)
        log_bound = math.log(clipping.max_grad_norm) + exponent
        bound = math.exp(min(max(log_bound, math.log(_SMALLEST)), math.log(_LARGEST)))
        self.clipping = clipping.at(bound)

    def state_dict(self) -> dict[str, Any]:
        """The bound as plain values."""
        return {"max_grad_norm": self.clipping.max_grad_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the bound that `state_dict` gave.

        Raises:
            PrivacyError: If it is something else.
        """
        value = state.get("max_grad_norm") if isinstance(state, Mapping) else None
        if not isinstance(value, float) or not _SMALLEST / 2 <= value <= 2 * _LARGEST:
            raise PrivacyError(
                f"the bound of AdaptiveClipping in this checkpoint is {value!r}: expected a positive number. Was the "
                "file changed by hand?"
            )
        self.clipping = self.clipping.at(value)
