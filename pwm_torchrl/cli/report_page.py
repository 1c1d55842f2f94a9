"""Prints the tables of a report and writes its page and figures; the last stage of ``launch/report.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.report import ReportContent
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import replacing
from pwm_torchrl.report.document import REPORT_FILE, make_document

__all__ = ["write"]

_LISTED = 8  # maximum number of figures listed on the console


def write(content: ReportContent) -> int:
    """Prints the tables and writes the page and its figures."""
    out = content.out
    document = make_document(content.runs, content.source, out, content.pairs, console.terminal_width())
    console.say(document.text + "\n")
    for note in document.notes:
        console.say(note)
    _write(out, document.files)
    console.say(f"report: {out / REPORT_FILE}")
    others = [name for name in document.files if name != REPORT_FILE]
    if others:
        drawn = [name for name in others if name.endswith(".png")]
        listed = drawn if len(drawn) <= _LISTED else [f"{len(drawn)} pictures"]
        console.say(f"beside it: {', '.join([*listed, *(name for name in others if name not in drawn)])}")
    return console.OK


def _write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes each file atomically, so that a browser never loads an incomplete one.

    Raises:
        ConfigurationError: if one cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(out / name) as draft:
                draft.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigurationError(f"--out={out} cannot be written: {error.strerror}") from error
