"""Poisson sampling of the user's own dataloader."""

from lightning_dp.data.checks import check_dataloader
from lightning_dp.data.poisson import Drawn, PhysicalBatch, PoissonLoader, even_chunks, largest_draw
from lightning_dp.data.private_dataset import PrivateDataset, units_of
from lightning_dp.data.public import MixedLoader, PublicStream, check_public
from lightning_dp.data.units import ExampleUnits, Units, UserUnits

__all__ = [
    "Drawn",
    "ExampleUnits",
    "MixedLoader",
    "PhysicalBatch",
    "PoissonLoader",
    "PrivateDataset",
    "PublicStream",
    "Units",
    "UserUnits",
    "check_dataloader",
    "check_public",
    "even_chunks",
    "largest_draw",
    "units_of",
]
