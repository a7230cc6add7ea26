"""``lightning-dp benchmark``: what privacy costs on the user's own model and data.

Owns: its arguments, the rows and what is compared. Does not own: the measuring (``race``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.benchmarking.child import BenchmarkError
from lightning_dp.benchmarking.configured import ConfiguredFit
from lightning_dp.benchmarking.fits import Variant
from lightning_dp.benchmarking.machine import this_machine
from lightning_dp.benchmarking.race import WARMUP, Race
from lightning_dp.benchmarking.result import Results, ratios_of
from lightning_dp.benchmarking.table import print_results, write_json

_DESCRIPTION = """\
Measures private training against ordinary training of the same model on the same data, all parameters and the biases
alone: time and peak memory. Every training is a process of its own, and they make their steps in turns. Nothing of it
is kept."""

_EPILOG = """\
All other arguments are those of lightning-dp fit, such as --config and --trainer.strategy.max_physical_batch_size."""

ORDINARY, PRIVATE = "ordinary", "private"
ORDINARY_BIAS, PRIVATE_BIAS = "ordinary bias-only", "private bias-only"
PAIRS = ((PRIVATE, ORDINARY), (PRIVATE_BIAS, ORDINARY_BIAS), (PRIVATE_BIAS, ORDINARY))


def benchmark_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: Those after ``benchmark``.

    Raises:
        SystemExit: If a training fails, or an argument is wrong.
    """
    parser = _parser()
    own, of_fit = parser.parse_known_args(arguments)
    if own.steps < 1:
        parser.error(f"argument --steps: {own.steps}, expected at least 1")
    if own.json is not None and not own.json.parent.is_dir():
        parser.error(f"argument --json: there is no directory {str(own.json.parent)!r}")
    try:
        results = measure_configuration(tuple(of_fit), own.steps)
    except BenchmarkError as error:
        sys.exit(f"lightning-dp benchmark: {error}")
    print_results(results)
    if own.json is not None:
        write_json([results], own.json)
        sys.stdout.write(f"Results: {own.json}\n")


def measure_configuration(arguments: tuple[str, ...], rounds: int) -> Results:
    """Measure the four trainings of a configuration.

    Args:
        arguments: Those of ``lightning-dp fit``.
        rounds: How many steps of each count.

    Raises:
        BenchmarkError: If one failed, or ran out of memory so early that its opponent's batches are not known.
    """
    with Race() as race:
        device = "cpu"
        for private, ordinary, bias_only in ((PRIVATE, ORDINARY, False), (PRIVATE_BIAS, ORDINARY_BIAS, True)):
            variant = Variant(True, bias_only, steps=WARMUP + rounds + 1)
            facts = race.start(private, ConfiguredFit(arguments, variant))
            if facts is None:
                raise BenchmarkError(f"{private}: out of memory before its first step. Use a smaller model.")
            race.start(ordinary, ConfiguredFit(arguments, variant.against(facts)))
            device = facts.device
        measured = {row.name: row for row in race.run(rounds)}
    rows = tuple(measured[name] for name in (ORDINARY, PRIVATE, ORDINARY_BIAS, PRIVATE_BIAS))
    return Results(" ".join(arguments), rows, ratios_of(rows, PAIRS), this_machine(device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-dp benchmark", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each training that count (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step and the machine into this file")
    return parser
