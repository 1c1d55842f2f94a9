"""``launch/evaluate.py``: the deterministic returns of trained policies, as text, as JSON and as a video."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pwm_torchrl.cli import console
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.user_code import make_cwd_importable

__all__ = ["ArgumentParser", "main"]

#: What is printed beside the return, where the environment or the task defines it.
OPTIONAL = {"success_rate": "success", "score": "score"}
VIDEO_FILE = "evaluation.mp4"
_STDOUT = "-"
#: Options whose file name may be left out, and how that name ends: another word after them is a run.
_FILES = {"--json": ".json", "--video": ".mp4"}

_EPILOG = """\
--json writes a list with one object per run, in the order given:
  run                    its directory
  checkpoint, epoch      the checkpoint asked for, and the epoch it was saved at
  return_mean, return_std
                         mean and standard deviation of undiscounted returns
  return_interval        95 % bootstrap interval of the mean: [low, high]
  episodes, returns      their number, and each one's return
  seed                   of the first episode; the next has seed + 1
  success_rate, score    from 0 to 1, where the environment or the task has one
  video                  the file that --video wrote
  error                  why there is no result, or no video
What is not known is null.

Exit code: the highest of all runs; 0 evaluated, 1 failed, 2 bad input.

examples:
  EVALUATE runs/my_run --episodes 20
  EVALUATE runs/a runs/b --checkpoint last --json results.json
  EVALUATE runs/my_run --video
"""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with this project's way of saying what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`ConfigurationError` instead of printing the usage and exiting."""
        raise ConfigurationError(f"{message}; {' '.join(self.format_usage().split())}")


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates each run on fresh environments and prints mean and spread of its returns.

    Returns:
        The highest exit code of all runs.
    """
    args = _arguments(argv)
    make_cwd_importable()
    to_stdout = args.json == _STDOUT
    results: list[dict[str, Any]] = []
    code = console.OK
    for run in args.runs:
        if len(args.runs) > 1 and sys.stderr.isatty():
            console.say(f"evaluating {run} ...", err=True)
        # What an environment or a simulator prints must not end up in the JSON.
        with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
            result, ended = _evaluate(run, args)
        results.append(result)
        code = max(code, ended)
    text = _text(results)
    if text:
        console.say(text, err=to_stdout)
    if args.json is not None:
        _write_json(results, args.json)
    return code


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=typed("evaluate"),
        description="Deterministic returns of trained policies in fresh environments.",
        epilog=_EPILOG.replace("EVALUATE", typed("evaluate")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--episodes", type=int, default=10, metavar="N", help="episodes per run (default: 10)")
    parser.add_argument(
        "--seed", type=int, metavar="SEED", help="seed of the environments (default: derived from the run's)"
    )
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best by evaluation return, last, or the number of an epoch (default: best)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE.json",
        help="write the results as JSON, to stdout unless a file is given",
    )
    parser.add_argument(
        "--video",
        nargs="?",
        const="",
        metavar="FILE.mp4",
        help=f"film the first episode; without a name the video is RUN/{VIDEO_FILE}",
    )
    args = parser.parse_intermixed_args(_with_optional_names(sys.argv[1:] if argv is None else argv))
    if args.episodes < 1:
        raise ConfigurationError(f"--episodes={args.episodes} is too small; it must be at least 1")
    if args.checkpoint not in ("best", "last", "latest") and not args.checkpoint.isdecimal():
        raise ConfigurationError(f"--checkpoint={args.checkpoint}: give best, last or the number of an epoch")
    if args.video and len(args.runs) > 1:
        raise ConfigurationError(
            f"--video={args.video} is one file for {len(args.runs)} runs; give --video without a name, "
            f"and each run gets a {VIDEO_FILE} in its directory"
        )
    for option, file in (("--json", args.json), ("--video", args.video)):
        if file and file != _STDOUT:
            _check_file(option, Path(file))
    return args


def _with_optional_names(argv: Sequence[str]) -> list[str]:
    """``--json RUN`` and ``--video RUN`` as argparse should read them: RUN is a run, not the name of a file."""
    words = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else ""
        named = following == _STDOUT or (Path(following).suffix and not Path(following).is_dir())
        if word in _FILES and (not named or following.startswith("--")):
            word = f"{word}={_STDOUT if word == '--json' else ''}"
        words.append(word)
    return words


def _check_file(option: str, file: Path) -> None:
    if file.suffix != _FILES[option]:
        raise ConfigurationError(f"{option}={file}: the name of the file must end in {_FILES[option]}")
    if file.is_dir() or not file.parent.is_dir():
        where = "is a directory" if file.is_dir() else f"cannot be written: there is no directory {file.parent}"
        raise ConfigurationError(f"{option}={file} {where}")


def _evaluate(run: Path, args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """A run's entry in the JSON, and its exit code; an error is printed, and does not end the command.

    Raises:
        Exception: a defect, with its traceback, if this is the only run.
    """
    keys = ("epoch", "return_mean", "return_std", "return_interval", "episodes", "returns", "seed", *OPTIONAL)
    entry: dict[str, Any] = {"run": str(run), "checkpoint": args.checkpoint, **dict.fromkeys(keys)}
    entry.update(video=None, error=None)
    try:
        load_config(run)  # one sentence, before torch is imported, if this is no run directory
        from pwm_torchrl.training import evaluate_run

        found = evaluate_run(run, episodes=args.episodes, seed=args.seed, which=args.checkpoint)
        entry.update(found, return_interval=_interval(found["returns"]))
        if args.video is not None:
            from pwm_torchrl.training import film_run

            file = Path(args.video) if args.video else run / VIDEO_FILE
            entry["video"] = str(film_run(run, file, seed=args.seed, which=args.checkpoint))
    except Exception as failure:
        if not console.is_ours(failure):
            if len(args.runs) == 1:
                raise
            traceback.print_exc()
        reason = str(failure) if console.is_ours(failure) else f"{type(failure).__name__}: {failure}"
        evaluated = entry["return_mean"] is not None
        entry["error"] = ("no video: " if evaluated else "") + " ".join(reason.split())
        named = "" if str(run) in reason else f"{run}: "
        console.error(f"{named}{entry['error']}")
        return entry, console.BAD_INPUT if isinstance(failure, ConfigurationError) else console.FAILED
    return entry, console.OK


def _interval(returns: Sequence[float]) -> list[float] | None:
    """95 % bootstrap interval of the mean; ``None`` for a single return."""
    from pwm_torchrl.report.statistics import bootstrap_interval

    if len(returns) < 2:
        return None
    low, high = bootstrap_interval([returns], lambda values, axis: values.mean(axis))
    return [float(low), float(high)]


def _text(results: Sequence[Mapping[str, Any]]) -> str:
    """Two lines for a single run, a table for several; runs without a result are not in it."""
    done = [result for result in results if result["return_mean"] is not None]
    if not done:
        return ""
    films = [f"video: {result['video']}" for result in done if result["video"]]
    if len(results) > 1:
        return "\n".join([_table(done), *films])
    (result,) = done
    more = "".join(f", {name} {result[key]:.2f}" for key, name in OPTIONAL.items() if result[key] is not None)
    mean, spread = result["return_mean"], result["return_std"]
    count = f"{result['episodes']} episode{'s' if result['episodes'] > 1 else ''}"
    line = f"{result['run']}: return {mean:.1f} ± {spread:.1f}{more} over {count}"
    facts = f"{_checkpoint(result)}; seed {result['seed']}"
    if result["return_interval"] is not None:
        facts = f"95 % interval of the mean {_bounds(result['return_interval'])}; {facts}"
    return "\n".join([line, f"  {facts}", *films])


def _checkpoint(result: Mapping[str, Any]) -> str:
    named = "" if result["checkpoint"].isdecimal() else f"{result['checkpoint']} checkpoint, "
    return f"{named}epoch {result['epoch']}"


def _bounds(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    from pwm_torchrl.report.collect import names_of
    from pwm_torchrl.report.tables import Table, fit_names

    shown = {key: name for key, name in OPTIONAL.items() if any(result[key] is not None for result in results)}
    head = ["epoch", "return", "± std", *shown.values(), "95 % interval"]
    rows = []
    for result in results:
        rows.append([str(result["epoch"]), f"{result['return_mean']:.1f}", f"{result['return_std']:.1f}"])
        rows[-1] += ["-" if result[key] is None else f"{result[key]:.2f}" for key in shown]
        rows[-1] += [_bounds(result["return_interval"])]
    taken = sum(max(len(row[i]) for row in (head, *rows)) + 2 for i in range(len(head)))
    names = names_of([Path(result["run"]) for result in results])
    width = console.terminal_width()
    if width is not None:
        names = fit_names(names, width - taken)
    return Table(["run", *head], [[name, *row] for name, row in zip(names, rows)]).text()


def _write_json(results: Sequence[Mapping[str, Any]], file: str) -> None:
    from pwm_torchrl.run.artifacts import json_text, swap_in

    text = json_text(list(results))
    if file == _STDOUT:
        console.say(text.rstrip("\n"))
        return
    try:
        swap_in(Path(file), text)
    except OSError as error:
        raise ConfigurationError(f"--json={file} cannot be written: {error.strerror}") from error
