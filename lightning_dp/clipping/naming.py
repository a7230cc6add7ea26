"""The names of clippings, and what ``max_grad_norm`` is beside a clipping object.

Owns: what the arguments ``clipping`` and ``max_grad_norm`` of a strategy mean together.
"""

from __future__ import annotations

from lightning_dp.clipping.adaptive import AdaptiveClipping
from lightning_dp.clipping.base import Clipping, NormClipping, check_factors
from lightning_dp.clipping.by_norm import AutomaticClipping, FlatClipping, PSACClipping
from lightning_dp.clipping.per_layer import PerLayerClipping
from lightning_dp.errors import PrivacyConfigurationError

_BY_NAME: dict[str, type[Clipping]] = {
    "flat": FlatClipping,
    "automatic": AutomaticClipping,
    "per_layer": PerLayerClipping,
    "psac": PSACClipping,
    "adaptive": AdaptiveClipping,
}


def resolve_clipping(clipping: str | Clipping, max_grad_norm: float | None = None) -> Clipping:
    """Return the clipping of a name, or the object itself.

    Args:
        clipping: The name or the object.
        max_grad_norm: C; ``None`` for the object's own, or 1 for a name.

    Raises:
        PrivacyConfigurationError: If there is none of that name, an object has another C, or its factors exceed it.
    """
    if isinstance(clipping, str):
        if clipping not in _BY_NAME:
            raise PrivacyConfigurationError(
                f"clipping={clipping!r}: expected one of {sorted(_BY_NAME)}, or a Clipping such as "
                "lightning_dp.PSACClipping(r=0.1)."
            )
        return _BY_NAME[clipping](1.0 if max_grad_norm is None else max_grad_norm)
    if not isinstance(clipping, Clipping):
        raise PrivacyConfigurationError(
            f"clipping={clipping!r}: expected one of {sorted(_BY_NAME)}, or a Clipping such as "
            "lightning_dp.PSACClipping(r=0.1)."
        )
    if max_grad_norm is not None and max_grad_norm != clipping.max_grad_norm:
        raise PrivacyConfigurationError(
            f"max_grad_norm={max_grad_norm!r} beside a {type(clipping).__name__} with max_grad_norm="
            f"{clipping.max_grad_norm:g}: expected one of them. Give it to the clipping and leave it out of the "
            "strategy."
        )
    if isinstance(clipping, NormClipping):
        check_factors(clipping)
    return clipping
