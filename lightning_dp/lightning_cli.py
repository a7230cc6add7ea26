"""Lightning's own command line, private by default.

Owns: the defaults, and the command ``plan``, which takes the arguments of ``fit`` and trains nothing. Everything else
is ``LightningCLI``: ``lightning-dp fit --config config.yaml``, ``--trainer.strategy.target_epsilon 1``,
``--print_config`` and so on. Does not own: commands that need no trainer (``cli``).
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from typing import Any

from jsonargparse import class_from_function  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dp.callbacks import PrivacyBudgetStopping, PrivacyMonitor
from lightning_dp.coverage import plan
from lightning_dp.strategies import PrivateStrategy
from lightning_dp.summary import print_summary

_DESCRIPTION = "Shows what a fit would do to every parameter and to its budget, and trains nothing.\n"
_PLOT_ARGUMENT = """Args:
            plot: A file that the budget is drawn into, such as plan.png.
            improvement: true: also estimate on public data what a step improves, by batch size; or a .json or .md file.

"""


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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands and ``plan``, with the arguments that the command line does not show."""
        commands = LightningCLI.subcommands()
        return {**commands, "plan": commands["fit"]}

    def before_instantiate_classes(self) -> None:
        """Save no configuration of a fit that is only planned."""
        if self.subcommand == "plan":
            self.save_config_callback = None

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the commands; Lightning looks for each on the trainer's class, where ``plan`` is only while it looks."""
        trainer_class = self.trainer_class
        self.trainer_class = _with_plan(trainer_class)
        super()._add_subcommands(parser, **kwargs)
        self.trainer_class = trainer_class

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; a plan of a fit that would be refused ends with exit status 1."""
        if subcommand != "plan":
            super()._run_subcommand(subcommand)
        elif plan(self.trainer, **self._prepare_subcommand_kwargs("plan")).is_refused:
            sys.exit(1)

    def after_fit(self) -> None:
        """Test, and show the summary."""
        metrics: dict[str, float] = {}
        if self._has_test_data() and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            (results,) = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False) or [{}]
            metrics = dict(results)
        if isinstance(self.trainer.strategy, PrivateStrategy) and self.trainer.is_global_zero:
            print_summary(self.trainer.strategy, metrics)

    def _has_test_data(self) -> bool:
        return any(is_overridden("test_dataloader", source) for source in (self.model, self.datamodule) if source)


def _with_plan(trainer_class: Any) -> type:
    """Return a subclass of the trainer's class with a method ``plan`` that has the arguments of ``fit``."""
    base = trainer_class if isinstance(trainer_class, type) else class_from_function(trainer_class)
    fit = base.fit  # type: ignore[attr-defined]

    @functools.wraps(fit)
    def described(*args: Any, **kwargs: Any) -> Any:
        return plan(*args, **kwargs)

    described.__doc__ = _DESCRIPTION + (fit.__doc__ or "").partition("\n")[2].replace("Args:\n", _PLOT_ARGUMENT, 1)
    described.__signature__ = _with_plot(inspect.signature(fit))  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"plan": described})


def _with_plot(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature with the further arguments of a plan, before ``**kwargs`` if there are any."""
    parameters = list(signature.parameters.values())
    at = sum(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter("plot", keyword, default=None, annotation=str | None),
        inspect.Parameter("improvement", keyword, default=False, annotation=bool | str),
    ]
    return signature.replace(parameters=[*parameters[:at], *own, *parameters[at:]])


def run_lightning(commands: str = "") -> None:
    """Run Lightning's command line on the arguments of the process.

    Args:
        commands: What the help says of further commands.
    """
    # Lightning 2.6 uses a pytree class that torch 2.9 deprecates; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
    DPLightningCLI(save_config_kwargs={"overwrite": True}, parser_kwargs={"epilog": commands} if commands else None)
