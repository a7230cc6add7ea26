"""``lightning-dp tune``: a private search of learning rate and steps for a configuration.

Owns: its arguments. Does not own: the search (``searching``) or its runs (``configured``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.errors import PrivacyError
from lightning_dp.tuning.configured import ConfiguredRuns
from lightning_dp.tuning.scaling import SearchSpace
from lightning_dp.tuning.searching import TuningResult, run_search, search_for

_DESCRIPTION = """\
Finds learning rate and steps by linear scaling, and trains with them, all within trainer.strategy.target_epsilon: a
few runs at small epsilons try random settings, and the final run has what they leave. Full batches only."""

_EPILOG = """\
All other arguments are those of lightning-dp fit, such as --config. An interrupted search goes on in its directory."""


def tune_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: Those after ``tune``.

    Raises:
        SystemExit: If an argument is wrong, or the search is refused.
    """
    own, of_fit = _parser().parse_known_args(arguments)
    try:
        tune_configuration(tuple(of_fit), own).print()
    except PrivacyError as error:
        sys.exit(f"lightning-dp tune: {error}")


def tune_configuration(arguments: tuple[str, ...], own: argparse.Namespace) -> TuningResult:
    """Search, for a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        own: Those of the search.

    Raises:
        PrivacyError: If the search is refused, or one of its runs is.
    """
    space = SearchSpace(tuple(own.lr), tuple(own.steps))
    runs = ConfiguredRuns(arguments, own.learning_rate, own.monitor, own.directory)
    strategy = runs.strategy()
    search = search_for(
        strategy,
        selection=own.selection,
        small_epsilons=tuple(own.small_epsilons) if own.small_epsilons else None,
        num_runs=tuple(own.num_runs),
        space=space,
        monitor=own.monitor,
        mode=own.mode,
        seed=own.seed,
    )
    return run_search(search, strategy, own.directory, runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-dp tune", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    space = SearchSpace()
    add = parser.add_argument
    add("--selection", required=True, metavar="public", help="'public' says that the validation data that chooses is")
    add("--monitor", default="val_accuracy", metavar="NAME", help="the validation metric that chooses (val_accuracy)")
    add("--mode", default="max", help="max or min of it (max)")
    add("--learning_rate", default="model.lr", metavar="ARGUMENT", help="the argument that is it (model.lr)")
    add("--lr", type=float, nargs=2, default=space.lr, metavar=("LEAST", "LARGEST"), help=f"to try in {space.lr}")
    add("--steps", type=int, nargs=2, default=space.num_steps, metavar=("LEAST", "MOST"), help=f"{space.num_steps}")
    add("--small_epsilons", type=float, nargs="+", metavar="EPSILON", help="of one run of each stage (5%%, 10%%)")
    add("--num_runs", type=int, nargs="+", default=(3, 3), metavar="RUNS", help="of each of these stages (3 3)")
    add("--seed", type=int, default=0, help="of the settings that are tried (0)")
    add("--directory", type=Path, default=Path("tuning"), metavar="FOLDER", help="of this search alone (tuning)")
    return parser
