"""Reports: what a private run did, what it cost, and what its guarantee does not cover.

Owns: the numbers that follow from the facts and the ledger, and their forms: JSON, Markdown, a figure. Does not own:
the facts (``lightning_dp.record``), their finding (``strategies.record``) or the moment of writing (``callbacks``).

Reading order: ``report``, ``numbers``, ``groups``, ``limits``, ``markdown``, ``figure``, ``files``, ``checkpoint``,
``command``.
"""

from lightning_dp.reporting.checkpoint import read_report, report_of
from lightning_dp.reporting.files import as_json, check_filename, schema, write_report
from lightning_dp.reporting.markdown import as_markdown
from lightning_dp.reporting.report import Report, make_report

__all__ = [
    "Report",
    "as_json",
    "as_markdown",
    "check_filename",
    "make_report",
    "read_report",
    "report_of",
    "schema",
    "write_report",
]
