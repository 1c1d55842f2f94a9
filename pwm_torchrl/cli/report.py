"""``launch/report.py``: chooses the runs, the comparison and the output folder of a report. Does not import pandas."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import RunReport, find_runs, read_runs, settle
from pwm_torchrl.report.select import Condition, Pairs, pair_or_advise, select
from pwm_torchrl.run.directory import CONFIG_FILE

__all__ = ["ReportContent", "find_content"]


@dataclass(frozen=True)
class ReportContent:
    """The content of a report.

    Attributes:
        runs (list of RunReport): the runs to show.
        source (str): description of where they are from.
        out (Path): folder of the page.
        pairs (Pairs, optional): the comparison.
    """

    runs: list[RunReport]
    source: str
    out: Path
    pairs: Pairs | None


def find_content(args: Namespace) -> ReportContent:
    """Finds the runs and the comparison."""
    conditions = [Condition.parse(text) for text in args.where]
    runs = read_runs(find_runs(args.runs))
    settle(runs)
    there = len(runs)
    runs = select(runs, conditions, args.newest)
    chosen = " ".join([*(f"--where {condition}" for condition in conditions), *(["--newest"] if args.newest else [])])
    if chosen:
        console.say(f"{len(runs)} of {there} runs: {chosen}\n")
    out = _output(args.out, args.runs)
    pairs = None
    if args.compare is not None:
        pairs = pair_or_advise(runs, args.compare, args.baseline, args.allow_differences, compose)
    source = " ".join([", ".join(map(str, args.runs)), *([chosen] if chosen else [])])
    return ReportContent(runs, source, out, pairs)


def _output(out: Path | None, given: Sequence[Path]) -> Path:
    """The folder to write into: ``--out``, else the only folder given, else the current one.

    Raises:
        ConfigurationError: if it is a file, or the current folder is a run that was not given.
    """
    if out is None:
        out = given[0] if len(given) == 1 else Path()
        if len(given) > 1 and (out / CONFIG_FILE).exists():
            raise ConfigurationError(
                f"the current folder has a {CONFIG_FILE} of its own; say where to write: --out DIR"
            )
    elif out.suffix.lower() in (".png", ".html", ".pdf") or out.is_file():
        raise ConfigurationError(f"--out={out} is a file; give a folder for the page and its pictures")
    return out
