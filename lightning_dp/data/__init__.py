"""Poisson sampling of the user's own dataloader."""

from lightning_dp.data.checks import check_dataloader
from lightning_dp.data.poisson import PhysicalBatch, PoissonLoader

__all__ = ["PhysicalBatch", "PoissonLoader", "check_dataloader"]
