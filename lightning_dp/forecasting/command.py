"""``lightning-dp plan`` from numbers alone.

Owns: its options. Does not own: ``lightning-dp plan --config``, which plans a fit (``lightning_cli``), or what is
answered (``question``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.forecasting.figure import ForecastFigure
from lightning_dp.forecasting.question import forecast
from lightning_dp.forecasting.tables import answer_of, print_forecast

_DESCRIPTION = """\
From numbers alone: what a privacy budget comes to, without model, data or training. Two of --target_epsilon,
--noise_multiplier and --num_steps (or --num_epochs) give the third."""

_EPILOG = """\
From a configuration: lightning-dp plan --config CONFIG takes the arguments of fit, and shows what that fit would do to
every parameter and to its budget, without training."""


def takes_numbers(arguments: Sequence[str]) -> bool:
    """Whether the arguments of ``plan`` are numbers, not those of a fit."""
    own = {option for action in _parser()._actions for option in action.option_strings}
    return any(argument.partition("=")[0] in own - {"-h", "--help", "--plot"} for argument in arguments)


def plan_numbers(arguments: Sequence[str]) -> None:
    """Run ``lightning-dp plan`` with numbers; end with exit status 2 if they do not go together."""
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(
            f"{' '.join(unknown)}: not an option beside numbers. Leave it out, or leave the numbers out to plan the "
            "fit of a configuration."
        )
    found = vars(known)
    plot = found.pop("plot")
    try:
        figure = ForecastFigure(plot) if plot else None
        result = forecast(**found)
    except PrivacyError as error:
        parser.exit(2, f"lightning-dp plan: {error}\n")
    asked = ("target_epsilon", "noise_multiplier", "num_steps")
    absent = [name for name in asked if found[name] is None and not (name == "num_steps" and found["num_epochs"])]
    print_forecast(result, answer_of(result, absent[0]))
    if figure is not None:
        figure.save(result)
        sys.stdout.write(f"Plot: {plot}\n")


def print_help() -> None:
    """Print the options."""
    _parser().print_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-dp plan", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    for name, kind, meaning in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=meaning, metavar=name.rpartition("_")[2].upper())
    parser.add_argument("--accountant", default="prv", help="as for DPStrategy; prv by default", metavar="NAME")
    parser.add_argument("--plot", help="draw it into this file, such as plan.png (needs matplotlib)", metavar="FILE")
    return parser


_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("num_examples", int, "N, the number of training examples"),
    ("batch_size", int, "the expected size of a logical batch"),
    ("sample_rate", float, "batch_size / N, instead of batch_size or of both"),
    ("target_epsilon", float, "the budget, in nats"),
    ("noise_multiplier", float, "noise standard deviation over max_grad_norm"),
    ("num_steps", int, "logical batches"),
    ("num_epochs", int, "passes over the data, instead of num_steps"),
    ("target_delta", float, "1/(10 N) by default"),
)
