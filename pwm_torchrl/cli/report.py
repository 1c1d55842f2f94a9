"""``launch/report.py``: tables, pictures and a page of runs, finished or not, and comparisons between them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.evaluate import ArgumentParser
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.report.collect import RunReport, find_runs, read_runs, settle
from pwm_torchrl.report.compare import Comparison, compare, compare_csv, compare_table, compare_tex, curves_csv
from pwm_torchrl.report.page import Section, render
from pwm_torchrl.report.scores import SCORE_TEXT, score_table
from pwm_torchrl.report.select import Condition, pair_or_advise, select
from pwm_torchrl.report.statistics import Group, group_runs
from pwm_torchrl.report.tables import group_table, memory_table, run_table
from pwm_torchrl.run.directory import CONFIG_FILE

__all__ = ["main"]

REPORT_FILE = "report.html"

_LISTED = 8  # pictures named on the console, at most

_CURVES = (
    "Mean over seeds, with a band of one standard deviation. A line is thin where not all seeds of its kind have come; "
    "between evaluations it is interpolated, and no seed is continued beyond its last one."
)
_SUMMARY = (
    "Mean ± standard deviation (population) over seeds of the deterministic return, as far as each run has come; time "
    "is the mean per run, memory the most of any."
)
_LOSSES = (
    "Means over seeds with their spread, as above; on a logarithmic axis where all values are positive and span more "
    "than a factor of ten. No more than twelve environments have pictures of losses and comparisons."
)
_MEMORY = (
    "Host memory is anonymous and shared memory of all processes of a run, mapped files apart; GPU memory what "
    "PyTorch's allocator held. The picture has of each model, size and environment the run that holds most."
)
_COMPARISON = (
    "Interquartile means over seeds with 95 % percentile-bootstrap intervals; of fewer than four seeds nothing is cut, "
    "so that it is their mean, and with few seeds intervals are too narrow. Estimates are over runs that finished; "
    "curves are over all runs that reach a point, thin where not all do. Differences are taken seed by seed. Work that "
    "was lost and done again after a restart is not in the hours."
)


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the page and its pictures."""
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
    comparison = None
    if args.compare is not None:
        comparison = compare(pair_or_advise(runs, args.compare, args.baseline, args.allow_differences))
    groups = group_runs(runs)
    _print_tables(runs, groups, comparison)
    pictures = _pictures(groups, comparison)
    files: dict[str, str | bytes] = {f"{name}.png": content for name, content in pictures.items()}
    if comparison is not None:
        files["compare.csv"], files["compare.tex"] = compare_csv(comparison), compare_tex(comparison)
        files["compare_curves.csv"] = curves_csv(comparison)
    files[REPORT_FILE] = _page(args.runs, chosen, runs, groups, comparison, pictures)
    _write(out, files)
    console.say(f"report: {out / REPORT_FILE}")
    others = [name for name in files if name != REPORT_FILE]
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
        help="of runs with the same settings and seed (where they ran and what they logged aside) only the one that "
        "was started last among those that finished, or among all if none has",
    )
    parser.add_argument(
        "--compare",
        metavar="KEY",
        help="compare runs that differ in this key (model, size, algorithm.horizon, ...) and in the seed: "
        "interquartile means with bootstrap intervals, also as compare.csv and compare.tex",
    )
    parser.add_argument("--baseline", metavar="VALUE", help="the value that differences are from (default: the first)")
    parser.add_argument(
        "--allow-differences", action="store_true", help="compare runs that differ in other keys too, and say in which"
    )
    return parser


def _output(out: Path | None, given: Sequence[Path]) -> Path:
    """The folder to write into: the one asked for, else the only one given, else the current one.

    Raises:
        ConfigurationError: if it is a file, or a run that nobody gave as the place to write to.
    """
    if out is None:
        out = given[0] if len(given) == 1 else Path()
        if len(given) > 1 and (out / CONFIG_FILE).exists():
            raise ConfigurationError(
                f"the current folder has a {CONFIG_FILE} of its own; say where to write: --out DIR"
            )
    elif out.suffix.lower() in (".png", ".html", ".pdf") or out.is_file():
        raise ConfigurationError(f"--out={out} is a file; give a folder, {REPORT_FILE} and pictures go there")
    return out


def _print_tables(runs: Sequence[RunReport], groups: Sequence[Group], comparison: Comparison | None) -> None:
    width = console.terminal_width()
    blocks = [run_table(runs).text(width)]
    errors = [f"{run.name}: {run.last_error}" for run in runs if run.last_error]
    if errors:
        blocks.append("\n".join(["last errors:", *(f"  {line}" for line in errors)]))
    if len(groups) < len(runs):
        blocks.append(group_table(groups).text(width))
    scores = score_table(runs)
    if scores is not None:
        blocks.append(f"normalised scores, 0 to 100:\n{scores.text(width)}")
    if comparison is not None:
        blocks.append(
            "\n".join([compare_table(comparison).text(width), *(f"note: {note}" for note in comparison.notes)])
        )
    console.say("\n\n".join(blocks) + "\n")


def _pictures(groups: Sequence[Group], comparison: Comparison | None) -> dict[str, bytes]:
    """PNG files by name; none, and a sentence, without matplotlib."""
    from pwm_torchrl.report import figures

    try:
        figures.require_matplotlib()
    except MissingLibraryError as missing:
        console.say(f"no pictures: {missing}")
        return {}
    pages = figures.returns_figures(groups)
    found = {"report_returns" + (f"_{n}" if n > 1 else ""): page for n, page in enumerate(pages, 1)}
    if not pages:
        console.say("curves: none yet, no run has logged a return")
    if comparison is not None:
        found.update(_named("compare", figures.comparison_figures(comparison)))
    found.update(_named("report_losses", figures.losses_figures(groups)))
    memory = figures.memory_figure(groups)
    if memory is not None:
        found["report_memory"] = memory
    envs = len({group.env for group in groups})
    if envs > figures.MOST_PICTURES:
        console.say(f"losses and comparisons are drawn for {figures.MOST_PICTURES} of {envs} environments")
    return found


def _named(prefix: str, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """By file name: an environment's name may hold anything."""
    return {f"{prefix}_{''.join(c if c.isalnum() or c in '._-' else '-' for c in k)}": v for k, v in pictures.items()}


def _page(
    given: Sequence[Path],
    chosen: str,
    runs: Sequence[RunReport],
    groups: Sequence[Group],
    comparison: Comparison | None,
    pictures: Mapping[str, bytes],
) -> str:
    def those(prefix: str) -> dict[str, bytes]:
        return {name: content for name, content in pictures.items() if name.startswith(prefix)}

    statuses = Counter(run.status for run in runs)
    subtitle = " · ".join(
        [
            " ".join([", ".join(map(str, given)), *([chosen] if chosen else [])]),
            f"{len(runs)} run{'s' if len(runs) > 1 else ''}: "
            + ", ".join(f"{n} {s}" for s, n in statuses.most_common()),
            datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        ]
    )
    sections = [Section("Summary", _SUMMARY, group_table(groups))]
    if comparison is not None:
        text = f"Baseline: {comparison.key}={comparison.arms[0]}. {_COMPARISON}"
        table, notes = compare_table(comparison), comparison.notes
        sections.append(Section(f"Comparison of {comparison.key}", text, table, those("compare"), notes))
    scores = score_table(runs)
    if scores is not None:
        sections.append(Section("Scores", SCORE_TEXT, scores))
    sections.append(Section("Learning curves", _CURVES, pictures=those("report_returns")))
    sections.append(Section("Losses", _LOSSES, pictures=those("report_losses")))
    sections.append(Section("Memory against plan", _MEMORY, memory_table(runs), those("report_memory")))
    sections.append(Section("Runs", table=run_table(runs)))
    shown = [s for s in sections if s.pictures or (s.table is not None and s.table.rows)]
    return render("Report of runs", subtitle, shown)


def _write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Each file in one step, so that a browser never loads half of one.

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
