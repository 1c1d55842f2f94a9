"""``launch/evaluate.py``: evaluates trained policies with deterministic actions; output as text, JSON and video."""

from __future__ import annotations

import contextlib
import sys
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pwm_torchrl import training
from pwm_torchrl.cli import console
from pwm_torchrl.cli.arguments import STDOUT, VIDEO_FILE
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import names_of
from pwm_torchrl.report.statistics import bootstrap_interval
from pwm_torchrl.report.tables import Table, fit_names
from pwm_torchrl.run.artifacts import json_text, write_atomically
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.user_code import make_cwd_importable

__all__ = ["run"]

#: Results that are printed beside the return if the environment or the task defines them, with their labels.
OPTIONAL = {"success_rate": "success", "score": "score"}


def run(args: Namespace) -> int:
    """Evaluates each run in new environments, and prints the mean and standard deviation of its returns.

    Returns:
        The highest exit code of all runs.
    """
    make_cwd_importable()
    to_stdout = args.json == STDOUT
    results: list[dict[str, Any]] = []
    code = console.OK
    for run in args.runs:
        if len(args.runs) > 1 and sys.stderr.isatty():
            console.say(f"evaluating {run} ...", err=True)
        # Output of an environment or simulator must not be mixed with the JSON.
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


def _evaluate(run: Path, args: Namespace) -> tuple[dict[str, Any], int]:
    """A run's entry in the JSON, and its exit code; an error is printed and does not end the command.

    Raises:
        Exception: an error that is not the package's own, if this is the only run.
    """
    keys = ("epoch", "return_mean", "return_std", "return_interval", "episodes", "returns", "seed", *OPTIONAL)
    entry: dict[str, Any] = {"run": str(run), "checkpoint": args.checkpoint, **dict.fromkeys(keys)}
    entry.update(video=None, error=None)
    try:
        load_config(run)  # raises before torch is imported if this is not a run directory
        found = training.evaluate_run(run, episodes=args.episodes, seed=args.seed, which=args.checkpoint)
        entry.update(found, return_interval=_interval(found["returns"]))
        if args.video is not None:
            file = Path(args.video) if args.video else run / VIDEO_FILE
            entry["video"] = str(training.film_run(run, file, seed=args.seed, which=args.checkpoint))
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
    if len(returns) < 2:
        return None
    low, high = bootstrap_interval([returns], lambda values, axis: values.mean(axis))
    return [float(low), float(high)]


def _text(results: Sequence[Mapping[str, Any]]) -> str:
    """Two lines for a single run, a table for several; runs without a result are left out."""
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
    text = json_text(list(results))
    if file == STDOUT:
        console.say(text.rstrip("\n"))
        return
    try:
        write_atomically(Path(file), text)
    except OSError as error:
        raise ConfigurationError(f"--json={file} cannot be written: {error.strerror}") from error
