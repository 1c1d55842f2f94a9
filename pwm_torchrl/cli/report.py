"""``launch/report.py``: tables, figures and a page of runs, finished or not, and comparisons between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.evaluate import ArgumentParser
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import find_runs, read_runs, settle
from pwm_torchrl.report.select import Condition, pair_or_advise, select
from pwm_torchrl.run.directory import CONFIG_FILE

__all__ = ["main"]

_LISTED = 8  # figures named on the console, at most


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the page and its figures."""
    args = _parser().parse_args(argv)
    if args.compare is None and (args.baseline is not None or args.allow_differences):
        raise ConfigurationError("--baseline and --allow-differences say how to compare; give --compare KEY too")
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
        pairs = pair_or_advise(runs, args.compare, args.baseline, args.allow_differences)
    from pwm_torchrl.report import document as pages

    source = " ".join([", ".join(map(str, args.runs)), *([chosen] if chosen else [])])
    document = pages.make_document(runs, source, out, pairs, console.terminal_width())
    console.say(document.text + "\n")
    for note in document.notes:
        console.say(note)
    _write(out, document.files)
    console.say(f"report: {out / pages.REPORT_FILE}")
    others = [name for name in document.files if name != pages.REPORT_FILE]
    if others:
        drawn = [name for name in others if name.endswith(".png")]
        listed = drawn if len(drawn) <= _LISTED else [f"{len(drawn)} pictures"]
        console.say(f"beside it: {', '.join([*listed, *(name for name in others if name not in drawn)])}")
    return console.OK


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=typed("report"), description="Tables, learning curves and memory of runs, finished or not."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="run directories, or folders that hold them")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where report.html and its pictures go (default: the folder given)"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this value; KEY is env, model, size, seed, status or a dotted key of the configuration; "
        "also KEY=VALUE,VALUE and KEY!=VALUE; may be given several times",
    )
    parser.add_argument(
        "--newest",
        action="store_true",
        help="of runs with the same settings and seed (wherever they ran) only the newest that finished, or the newest "
        "of all if none has",
    )
    parser.add_argument(
        "--compare",
        metavar="KEY",
        help="compare runs that differ in this key (model, size, algorithm.horizon, ...) and in the seed: "
        "interquartile means with bootstrap intervals, also as compare.csv and compare.tex",
    )
    parser.add_argument("--baseline", metavar="VALUE", help="the value to compare with (default: the first)")
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare runs that differ in other keys too, and list those keys",
    )
    return parser


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


def _write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes each file in one step, so that a browser never loads half of one.

    Raises:
        ConfigurationError: if one cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = out / f"{name}.tmp"
            try:
                partial.write_bytes(content.encode() if isinstance(content, str) else content)
                os.replace(partial, out / name)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--out={out} cannot be written: {error.strerror}") from error
