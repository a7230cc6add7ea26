"""``lightning-dp report CKPT``: the report of a checkpoint, in the terminal and as files.

Owns: its arguments. Does not own: the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markdown import Markdown

from lightning_dp.errors import PrivacyError
from lightning_dp.reporting.checkpoint import read_report
from lightning_dp.reporting.files import check_filename, write_report
from lightning_dp.reporting.markdown import as_markdown


def report_command(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: Those after ``report``.

    Raises:
        SystemExit: If there is no report to be had; the reason is its message.
    """
    options = _parser().parse_args(arguments)
    try:
        _run(options.checkpoint, options.output, options.accountant)
    except PrivacyError as error:
        sys.exit(f"lightning-dp report: {error}")


def _run(checkpoint: str, output: str | None, accountant: str | None) -> None:
    folder, name = os.path.split(output or "privacy_report")
    check_filename(name)
    report = read_report(checkpoint, accountant)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(Markdown(as_markdown(report)))
    for path in write_report(report, folder or ".", name) if output else ():
        console.print(f"Wrote {path}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dp report",
        description="Show the privacy report of a checkpoint. Releases that the journals beside it know of count, too.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of a private fit")
    parser.add_argument("--output", metavar="DIR/NAME", help="write NAME.json, NAME.md and NAME.png into DIR")
    parser.add_argument("--accountant", metavar="NAME", help="recompute epsilon by another accountant, such as rdp")
    return parser
