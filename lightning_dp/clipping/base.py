"""What every clipping is: a bound on what one sample adds to the sum of gradients, and how it is kept.

Owns: `Clipping`, `NormClipping`, and the check of those that users write. Does not own: the kinds (``by_norm``,
``per_layer``, ``adaptive``), the norms (``bookkeeping``) or the noise (``noise``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyConfigurationError

_ROUNDING = 1e-6
"""By how much a factor may exceed what the bound allows: norms are found in float32."""


class Clipping(ABC):
    """Bounds what one sample adds to the sum of gradients.

    Guarantee: the clipped gradient of a sample, over all parameters, has a norm of at most ``sensitivity``, up to the
    rounding of the norm's dtype.

    Args:
        max_grad_norm: C > 0, the largest L2 norm (not squared) of what one sample adds to the sum.

    Raises:
        PrivacyConfigurationError: If ``max_grad_norm`` is not a positive finite number.
    """

    def __init__(self, max_grad_norm: float = 1.0) -> None:
        self.max_grad_norm = positive("max_grad_norm", max_grad_norm, "the largest norm of one sample's gradient")

    @property
    def sensitivity(self) -> float:
        """How far the sum can move when one example is added or removed (L2 norm, not squared)."""
        return self.max_grad_norm

    @abstractmethod
    def parts(self, sizes: Mapping[str, int]) -> Sequence[Part]:
        """Return the groups of parameters that are clipped, each on its own.

        Every factor follows from the norm of its own group alone, so that a group can be clipped as soon as its
        gradients are there, whatever the others do and wherever they lie.

        Args:
            sizes: The number of elements of every trained parameter, by name. A parameter that is used in several
                places, a tied one, is there once.
        """

    def check_names(self, names: Iterable[str]) -> None:  # noqa: B027 - most name no parameter
        """Check what names parameters.

        Args:
            names: Of all parameters of the module, trained or not.

        Raises:
            PrivacyConfigurationError: If a parameter is meant that is not there.
        """

    def __str__(self) -> str:
        """Return the kind in a few words, to be shown."""
        return type(self).__name__


class NormClipping(Clipping):
    """Multiplies the whole gradient of a sample by one factor, which follows from its norm.

    To make another one, subclass it and define ``_factor``.

    Guarantee: ``factor(norm) * norm <= sensitivity`` for every norm. A norm that is not finite has the factor 0: such a
    sample adds nothing, which the bound allows.
    """

    def parts(self, sizes: Mapping[str, int]) -> Sequence[Part]:
        """Return all parameters as one group."""
        return [Part(self, tuple(sizes))]

    def factor(self, norm: Tensor) -> Tensor:
        """Return the factors of gradients with these norms.

        Args:
            norm: L2 norms (not squared) of the samples' gradients, shape ``[B]``.

        Returns:
            Factors, shape ``[B]``, 0 where the norm is not finite.
        """
        return torch.where(norm < math.inf, self._factor(norm), 0.0)  # of nan that is false, too

    @abstractmethod
    def _factor(self, norm: Tensor) -> Tensor:
        """Return the factors of finite norms."""


class Part(NamedTuple):
    """A group of parameters that is clipped on its own.

    Args:
        clipping: Clips it.
        names: Its parameters.
    """

    clipping: NormClipping
    names: tuple[str, ...]


def checked_parts(clipping: Clipping, sizes: Mapping[str, int]) -> Sequence[Part]:
    """Return the groups of a clipping, after a check that together they keep its bound.

    What a sample adds to all groups is at most ``sqrt(sum_k S_k^2)`` long, S_k being the sensitivity of group k.

    Args:
        clipping: The clipping.
        sizes: The number of elements of every trained parameter, by name.

    Raises:
        PrivacyConfigurationError: If a parameter is in no group or in several, or the groups exceed the sensitivity.
    """
    parts = clipping.parts(sizes)
    held = Counter(name for part in parts for name in part.names)
    for name in sizes:
        if held[name] != 1:
            raise PrivacyConfigurationError(
                f"clipping={type(clipping).__name__}: parameter '{name}' is in {held[name]} of its groups, expected "
                "one. Let parts() return every name that it is given exactly once."
            )
    total = math.hypot(*(part.clipping.sensitivity for part in parts))
    if not total <= clipping.sensitivity * (1 + _ROUNDING):
        raise PrivacyConfigurationError(
            f"clipping={type(clipping).__name__}: one sample can add {total:.6g} to its groups together, by the root "
            f"of the sum of their squared sensitivities, and its sensitivity is said to be {clipping.sensitivity:.6g}. "
            "Lower the bounds of the groups, or return that sensitivity."
        )
    for one in {type(part.clipping): part.clipping for part in parts}.values():
        check_factors(one)
    return parts


def check_factors(clipping: NormClipping) -> None:
    """Check the factors of a clipping, which users may have written, on norms of every size.

    Raises:
        PrivacyConfigurationError: If some norm gets longer than the sensitivity, or a factor is not a finite number.
    """
    norm = torch.cat([torch.zeros(1), torch.logspace(-30, 30, 601, dtype=torch.float64)])
    norm = torch.cat([norm, torch.linspace(0.9, 1.1, 201, dtype=torch.float64) * clipping.sensitivity])
    factor = clipping.factor(norm)
    too_long = ~(factor.isfinite() & ((factor * norm).abs() <= clipping.sensitivity * (1 + _ROUNDING)))
    for at in too_long.nonzero().flatten().tolist():
        raise PrivacyConfigurationError(
            f"clipping={type(clipping).__name__}: a gradient of norm {float(norm[at]):.6g} gets the factor "
            f"{float(factor[at]):.6g}, and its sensitivity is said to be {clipping.sensitivity:.6g}. Let _factor "
            "return at most sensitivity / norm, and a finite number for the norm 0."
        )


def positive(name: str, value: object, meaning: str) -> float:
    """Return a positive finite number.

    Raises:
        PrivacyConfigurationError: If it is none.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise PrivacyConfigurationError(f"{name}={value!r}: expected a positive number, {meaning}.")
    return float(value)  # type: ignore[arg-type]
