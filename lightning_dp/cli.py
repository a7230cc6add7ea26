"""``lightning-dp``: which command runs.

Owns: the commands that are none of a trainer, and their place before Lightning's own. Does not own: what they do, or
Lightning's command line (``lightning_cli``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_dp.benchmarking.command import benchmark_command
from lightning_dp.forecasting.command import plan_numbers, print_help, takes_numbers
from lightning_dp.lightning_cli import DPLightningCLI, run_lightning
from lightning_dp.reporting.command import report_command
from lightning_dp.tuning.command import tune_command

__all__ = ["COMMANDS", "Command", "DPLightningCLI", "main"]


@dataclass(frozen=True)
class Command:
    """A command that is none of a trainer.

    Args:
        run: Runs it on the arguments after its name; ends with ``SystemExit`` if they are wrong.
        summary: What it does, for the help.
        takes: Whether it takes these arguments; what it does not take is Lightning's.
    """

    run: Callable[[Sequence[str]], None]
    summary: str
    takes: Callable[[Sequence[str]], bool] = lambda arguments: True


COMMANDS = {
    "plan": Command(
        plan_numbers, "with --num_examples and other numbers: what a budget comes to, without a model", takes_numbers
    ),
    "benchmark": Command(
        benchmark_command, "with the arguments of fit: what privacy costs there in time and memory, measured"
    ),
    "tune": Command(tune_command, "with the arguments of fit: a search of hyper-parameters, within one budget"),
    "report": Command(report_command, "CKPT: what a private fit did, what it cost and what is not covered"),
}


def main() -> None:
    """Run ``lightning-dp``."""
    name, *arguments = sys.argv[1:] or [""]
    command = COMMANDS.get(name)
    if command is not None and command.takes(arguments):
        command.run(arguments)
        return
    if name == "plan" and arguments in (["-h"], ["--help"]):
        print_help()
        sys.stdout.write("\nThe arguments of a fit that is planned:\n\n")
    run_lightning("further commands: " + "; ".join(f"{n} {c.summary}" for n, c in COMMANDS.items()))


if __name__ == "__main__":
    main()
