"""``lightning-dp tune``: a private search of hyper-parameters for a configuration.

Owns: its arguments. Does not own: the searches (``searching``, ``random_search``) or their runs (``configured``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.accounting import Repetitions
from lightning_dp.errors import PrivacyConfigurationError, PrivacyError
from lightning_dp.tuning.candidates import RandomSearch
from lightning_dp.tuning.configured import ConfiguredRuns
from lightning_dp.tuning.fits import budget_of
from lightning_dp.tuning.random_search import RandomSearchResult, run_random_search
from lightning_dp.tuning.scaling import SearchSpace
from lightning_dp.tuning.scores import PrivateSelection, Scores, resolve_selection
from lightning_dp.tuning.searching import TuningResult, run_search, search_for

_DESCRIPTION = """\
--method scaling finds learning rate and steps by linear scaling, and trains with them, all within
trainer.strategy.target_epsilon: a few runs at small epsilons try random settings, and the final run has what they
leave. Full batches only.
--method random trains a random number of times with random hyper-parameters, and keeps the best run alone: nothing else
of the search may be released, not even how long it took. With --help it shows its own arguments."""

_EPILOG = """\
All other arguments are those of lightning-dp fit, such as --config. An interrupted search goes on in its directory."""


def tune_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: Those after ``tune``.

    Raises:
        SystemExit: If an argument is wrong, or the search is refused.
    """
    method = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    method.add_argument("--method", default="scaling")
    chosen = method.parse_known_args(arguments)[0].method
    own, of_fit = _parser(chosen).parse_known_args(arguments)
    search = random_configuration if chosen == "random" else tune_configuration
    try:
        search(tuple(of_fit), own).print()
    except PrivacyError as error:
        sys.exit(f"lightning-dp tune: {error}")


def tune_configuration(arguments: tuple[str, ...], own: argparse.Namespace) -> TuningResult:
    """Search by linear scaling, for a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        own: Those of the search.

    Raises:
        PrivacyError: If the search is refused, or one of its runs is.
    """
    space = SearchSpace(tuple(own.lr), tuple(own.steps))
    selection = _selection(own)
    runs = ConfiguredRuns(arguments, Scores(own.monitor, selection), {"lr": own.learning_rate})
    strategy = runs.strategy()
    search = search_for(
        strategy,
        selection=selection,
        small_epsilons=tuple(own.small_epsilons) if own.small_epsilons else None,
        num_runs=tuple(own.num_runs),
        space=space,
        monitor=own.monitor,
        mode=own.mode,
        seed=own.seed,
    )
    return run_search(search, strategy, own.directory, runs)


def random_configuration(arguments: tuple[str, ...], own: argparse.Namespace) -> RandomSearchResult:
    """Search at random, for a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        own: Those of the search.

    Raises:
        PrivacyError: If the search is refused, or one of its runs is.
    """
    space = {name: _range(name, *values) for name, *values in own.space or ()}
    selection = _selection(own)
    runs = ConfiguredRuns(arguments, Scores(own.monitor, selection))
    strategy, repetitions = runs.strategy(), Repetitions(own.mean_runs, own.shape)
    space = space or {"model.lr": SearchSpace().lr}
    search = RandomSearch(*budget_of(strategy), repetitions, space, own.monitor, own.mode, selection)
    return run_random_search(search, strategy, own.directory, runs)


def _selection(own: argparse.Namespace) -> PrivateSelection | None:
    if own.selection == "private":
        return PrivateSelection(own.score_noise, tuple(own.score_bounds))
    return resolve_selection(own.selection)


def _range(name: str, least: str, largest: str) -> tuple[float, float]:
    """The range of an argument of a fit."""
    if name.partition(".")[0] == "trainer":
        raise PrivacyConfigurationError(
            f"--space {name}: expected an argument of the model or the data. The trainer and its strategy are the same "
            "in all runs, which is what their bound is for."
        )
    try:
        return float(least), float(largest)
    except ValueError as error:
        raise PrivacyConfigurationError(f"--space {name} {least} {largest}: expected two numbers.") from error


def _parser(method: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-dp tune", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("--method", default="scaling", choices=("scaling", "random"), help="how to search (scaling)")
    choices, paid = ("public", "private"), PrivateSelection()
    noise, bounds = paid.noise_multiplier, paid.bounds
    add("--selection", required=True, choices=choices, help="what the validation data that chooses is")
    add("--score_noise", type=float, default=noise, metavar="NOISE", help=f"of scores on private data ({noise:g})")
    add("--score_bounds", type=float, nargs=2, default=bounds, metavar=("LOW", "HIGH"), help="of one example's (0 1)")
    add("--monitor", default="val_accuracy", metavar="NAME", help="the validation metric that chooses (val_accuracy)")
    add("--mode", default="max", help="max or min of it (max)")
    add("--directory", type=Path, default=Path("tuning"), metavar="FOLDER", help="of this search alone (tuning)")
    (_add_random if method == "random" else _add_scaling)(parser)
    return parser


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    space, add = SearchSpace(), parser.add_argument
    add("--learning_rate", default="model.lr", metavar="ARGUMENT", help="the argument that is it (model.lr)")
    add("--lr", type=float, nargs=2, default=space.lr, metavar=("LEAST", "LARGEST"), help=f"to try in {space.lr}")
    add("--steps", type=int, nargs=2, default=space.num_steps, metavar=("LEAST", "MOST"), help=f"{space.num_steps}")
    add("--small_epsilons", type=float, nargs="+", metavar="EPSILON", help="of one run of each stage (5%%, 20%%)")
    add("--num_runs", type=int, nargs="+", default=(3, 3), metavar="RUNS", help="of each of these stages (3 3)")
    add("--seed", type=int, default=0, help="of the settings that are tried (0)")


def _add_random(parser: argparse.ArgumentParser) -> None:
    runs, add, names = Repetitions(), parser.add_argument, ("ARGUMENT", "LEAST", "LARGEST")
    add("--space", action="append", nargs=3, metavar=names, help="to search in; repeated (model.lr 0.05 2)")
    add("--mean_runs", type=float, default=runs.mean, metavar="RUNS", help=f"expected number of runs ({runs.mean:g})")
    add("--shape", type=float, default=runs.shape, help="of its distribution: 1 geometric, 0 logarithmic, inf Poisson")
