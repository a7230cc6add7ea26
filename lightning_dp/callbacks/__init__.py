"""Callbacks: they observe, freeze, stop and report; none of them enforces privacy, the strategy does."""

from lightning_dp.callbacks.bias_only_finetuning import BiasOnlyFinetuning
from lightning_dp.callbacks.privacy_budget_stopping import PrivacyBudgetStopping
from lightning_dp.callbacks.privacy_monitor import PrivacyMonitor
from lightning_dp.callbacks.privacy_report import PrivacyReport
from lightning_dp.callbacks.public_pretraining import PublicPretraining

__all__ = ["BiasOnlyFinetuning", "PrivacyBudgetStopping", "PrivacyMonitor", "PrivacyReport", "PublicPretraining"]
