"""Reports as files: JSON with a schema, Markdown, and a figure if matplotlib is installed.

Owns: the form and the names of the files. Does not own: what is in them.
"""

from __future__ import annotations

import io
import json
import os
from importlib.resources import files
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.plain import to_plain
from lightning_dp.plotting import can_plot
from lightning_dp.reporting.figure import draw
from lightning_dp.reporting.markdown import as_markdown
from lightning_dp.reporting.report import Report

_SUFFIXES = (".json", ".md", ".png")


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `as_json`."""
    text = files("lightning_dp.reporting").joinpath("privacy_report.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def as_json(report: Report) -> str:
    """Return a report as JSON: an infinite epsilon is the string ``"infinity"``."""
    plain = {"$schema": schema()["$id"], **to_plain(report)}
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def check_filename(filename: object) -> str:
    """Return the name of a report's files, without folder and suffix.

    Raises:
        PrivacyConfigurationError: If it is not such a name.
    """
    plain = isinstance(filename, str) and os.path.basename(filename) == filename and filename not in ("", ".", "..")
    if plain and not str(filename).endswith(_SUFFIXES):
        return str(filename)
    raise PrivacyConfigurationError(
        f"filename={filename!r}: expected a name without folder and suffix, such as 'privacy_report'; .json, .md and "
        ".png are added to it."
    )


def write_report(report: Report, folder: str | os.PathLike[str], filename: str) -> list[str]:
    """Write a report, in the place of an earlier one.

    Args:
        report: What is written.
        folder: A directory, which is made if need be, or an address that fsspec knows.
        filename: Without suffix.

    Returns:
        The files that were written.

    Raises:
        PrivacyConfigurationError: If ``filename`` is not the name of a file without suffix.
    """
    name, plotted = check_filename(filename), can_plot()
    contents = {".json": as_json(report).encode(), ".md": as_markdown(report, name if plotted else None).encode()}
    if plotted:
        contents[".png"] = _png(report)
    path = os.fspath(folder).rstrip("/")
    system = get_filesystem(path)
    system.makedirs(path, exist_ok=True)
    written = []
    for suffix, content in contents.items():
        written.append(f"{path}/{name}{suffix}")
        with system.open(written[-1], "wb") as file:
            file.write(content)
    return written


def _png(report: Report) -> bytes:
    buffer = io.BytesIO()
    draw(report).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
