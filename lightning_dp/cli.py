"""``lightning-dp``: Lightning's own command line, private by default.

Owns: the defaults. Everything else is ``LightningCLI``: ``lightning-dp fit --config config.yaml``,
``--trainer.strategy.target_epsilon 1``, ``--print_config`` and so on.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dp.callbacks import PrivacyBudgetStopping, PrivacyMonitor
from lightning_dp.strategies import DPStrategy
from lightning_dp.summary import print_summary


class DPLightningCLI(LightningCLI):
    """``LightningCLI`` with `DPStrategy`, `PrivacyMonitor` and `PrivacyBudgetStopping` by default.

    The strategy is ``trainer.strategy`` in YAML, the callbacks are ``privacy_monitor`` and ``privacy_budget_stopping``.
    After a fit the model is tested, if there is test data, and one table shows what was spent and what was reached.
    """

    def __init__(self, *args: Any, trainer_defaults: dict[str, Any] | None = None, **kwargs: Any) -> None:
        private = {"strategy": {"class_path": "lightning_dp.DPStrategy"}}
        kwargs["trainer_defaults"] = private | (trainer_defaults or {})
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the default callbacks."""
        parser.add_lightning_class_args(PrivacyMonitor, "privacy_monitor")
        parser.add_lightning_class_args(PrivacyBudgetStopping, "privacy_budget_stopping")
        parser.set_defaults({"privacy_monitor.summary": False})  # `after_fit` prints a table with the test metrics

    def after_fit(self) -> None:
        """Test, and show the summary."""
        metrics: dict[str, float] = {}
        if self._has_test_data() and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            (results,) = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False) or [{}]
            metrics = dict(results)
        if isinstance(self.trainer.strategy, DPStrategy) and self.trainer.is_global_zero:
            print_summary(self.trainer.strategy, metrics)

    def _has_test_data(self) -> bool:
        return any(is_overridden("test_dataloader", source) for source in (self.model, self.datamodule) if source)


def main() -> None:
    """Run ``lightning-dp``."""
    # Lightning 2.6 uses a pytree class that torch 2.9 deprecates; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    DPLightningCLI(save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
