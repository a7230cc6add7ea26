"""Poisson sampling of the user's own dataloader."""

from lightning_dp.data.checks import check_dataloader
from lightning_dp.data.poisson import Drawn, PhysicalBatch, PoissonLoader, largest_draw
from lightning_dp.data.units import ExampleUnits, Units

__all__ = ["Drawn", "ExampleUnits", "PhysicalBatch", "PoissonLoader", "Units", "check_dataloader", "largest_draw"]
