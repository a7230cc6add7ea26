"""Poisson sampling of the user's own dataloader."""

from lightning_dp.data.checks import check_dataloader
from lightning_dp.data.poisson import PhysicalBatch, PoissonLoader, largest_draw

__all__ = ["PhysicalBatch", "PoissonLoader", "check_dataloader", "largest_draw"]
