"""Lightning strategies: thin adapters from Lightning's hooks to the private step."""

from lightning_dp.strategies.arguments import PrivateStrategy
from lightning_dp.strategies.dp import DPStrategy
from lightning_dp.strategies.fsdp import DPFSDPStrategy

__all__ = ["DPFSDPStrategy", "DPStrategy", "PrivateStrategy"]
