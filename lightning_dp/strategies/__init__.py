"""Lightning strategies: thin adapters from Lightning's hooks to the private step."""

from lightning_dp.strategies.dp import DPStrategy

__all__ = ["DPStrategy"]
