"""Clipping: what bounds the share of one sample, and the sensitivity that follows.

Reading order: ``base``, ``by_norm``, ``per_layer``, ``adaptive``.
"""

from lightning_dp.clipping.adaptive import AdaptiveClipping
from lightning_dp.clipping.base import Clipping, NormClipping, Part, check_factors, checked_parts
from lightning_dp.clipping.by_norm import AutomaticClipping, FlatClipping, PSACClipping
from lightning_dp.clipping.naming import resolve_clipping
from lightning_dp.clipping.per_layer import PerLayerClipping

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "FlatClipping",
    "NormClipping",
    "PSACClipping",
    "Part",
    "PerLayerClipping",
    "check_factors",
    "checked_parts",
    "resolve_clipping",
]
