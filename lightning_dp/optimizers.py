"""Optimizers that know of the noise in the gradients they step by.

Owns: `DPAdamBC`, and how an optimizer is told the noise (`NoiseAware`). Does not own: the noise (``mechanism``). What
an optimizer does with released gradients is post-processing: it costs no privacy.

Tang et al., "DP-AdamBC", arXiv 2312.14334, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_dp.errors import PrivacyConfigurationError, PrivacyError


@runtime_checkable
class NoiseAware(Protocol):
    """An optimizer that is told the noise; `DPStrategy` does so before every step."""

    def receive_noise(self, noise_std: float) -> None:
        """Receive what the next step has to know.

        Args:
            noise_std: Standard deviation of the noise in each coordinate of the gradients of the next step, which was
                ``noise_multiplier * sensitivity / expected_batch_size`` when they were released; 0 for gradients
                without noise.
        """


def tell_noise(optimizer: Optimizer, noise_std: float) -> None:
    """Tell an optimizer the noise, if it asks for it."""
    receive: Callable[[float], None] | None = getattr(optimizer, "receive_noise", None)
    if receive is not None:  # as isinstance(optimizer, NoiseAware), which takes long, for every step
        receive(noise_std)


class DPAdamBC(Optimizer):
    """Adam, with the noise taken out of the second moment: ``m / sqrt(max(v - noise variance, floor))``.

    The noise of private training adds its variance to every squared gradient. Where that is the greater part, Adam
    divides all coordinates by nearly the same number, and steps as SGD does. Its variance is known and not private, so
    it is subtracted. It follows the noise where that changes, by a schedule or by `AdaptiveClipping`: what is
    subtracted is the same moving average, of the variances.

    The variance comes from `DPStrategy`, before every step; there is no argument for it. Gradients have to reach the
    optimizer as they were released: clipped or scaled once more, they have another.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the first and of the second moment, each in [0, 1).
        floor: Above 0, the least corrected second moment (gamma' of the paper). Near it updates are large: the larger
            the noise, the larger it has to be; tune it with the learning rate, on public data.
        weight_decay: As of AdamW: ``lr * weight_decay`` of every parameter is taken off before its step.

    Raises:
        PrivacyConfigurationError: If an argument is out of range.
        PrivacyError: In ``step``, if no private strategy has told the noise.

    Example:
        >>> def configure_optimizers(self):  # doctest: +SKIP
        ...     return DPAdamBC(self.parameters(), lr=1e-3)
    """

    _noise_std: float | None = None  # of the class, too: copies of optimizers are made without __init__

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check("lr", lr, 0 <= lr < math.inf, "a number of at least 0")
        for beta in betas:
            _check("betas", betas, 0 <= beta < 1, "two numbers in [0, 1)")
        _check("floor", floor, 0 < floor < math.inf, "a positive number")
        _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number of at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "floor": floor, "weight_decay": weight_decay})

    def receive_noise(self, noise_std: float) -> None:
        """Receive the standard deviation of the noise in the gradients of the next step."""
        self._noise_std = noise_std

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a step.

        Args:
            closure: Computes the gradients, as Lightning passes it.

        Raises:
            PrivacyError: If the noise in these gradients is not known.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        noise_std, self._noise_std = self._noise_std, None
        if noise_std is None:
            raise PrivacyError(
                "DPAdamBC was not told the noise in the gradients of this step: expected Trainer(strategy="
                "DPStrategy(...)), which tells it once before every step. Train with it, or use torch.optim.Adam."
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, noise_std**2)
        return result

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], variance: float) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"], state["noise_variance"] = 0, 0.0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["noise_variance"] = second * state["noise_variance"] + (1 - second) * variance
        corrected = (state["exp_avg_sq"] - state["noise_variance"]).div_(1 - second ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], corrected.clamp_(min=group["floor"]).sqrt_(), value=-size)


def _check(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise PrivacyConfigurationError(f"{name}={value!r} of DPAdamBC: expected {expected}.")
