"""Shared by all commands: error messages, exit codes, the summary line."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pwm_torchrl.commands import typed_here, what_next
from pwm_torchrl.errors import ConfigurationError, is_ours, status_of
from pwm_torchrl.terminal import coloured, joined, say

__all__ = [
    "BAD_INPUT",
    "EXIT_CODES",
    "FAILED",
    "MEMORY",
    "OK",
    "STOPPED",
    "STORAGE",
    "command",
    "error",
    "fail",
    "is_ours",
    "next_lines",
    "resume_hint",
    "say",
    "status_of",
    "summary_line",
    "terminal_width",
    "width",
]

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
STORAGE, MEMORY = 74, 75  # EX_IOERR and EX_TEMPFAIL of sysexits.h: can be retried with another disk or more memory

#: Exit codes by a run's status.
EXIT_CODES = {"finished": OK, "stopped": STOPPED, "memory": MEMORY, "storage": STORAGE, "failed": FAILED}

#: What to do before a run is resumed, by its status.
_REMEDIES = {
    "memory": "with more memory (or a larger memory.host_gib, if that is the limit)",
    "storage": "after freeing disk space",
}

Main = Callable[[Sequence[str] | None], int]


def command(main: Main) -> Main:
    """Wraps ``main(argv)``: bad input ends with an error message and exit code 2, Ctrl-C without a traceback."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(list(sys.argv[1:] if argv is None else argv))
        except ConfigurationError as bad:
            error(str(bad))
            return BAD_INPUT
        except KeyboardInterrupt:
            say("", err=True)
            return STOPPED
        except BrokenPipeError:
            # The reader (head, less) has closed the pipe; avoid an error when Python flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK

    return wrapped


def width() -> int:
    """Columns for tables: those of the terminal, limited to 60 to 120; 80 without a terminal."""
    return min(120, max(60, shutil.get_terminal_size((80, 24)).columns))


def terminal_width() -> int | None:
    """Columns of the terminal; ``None`` if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def error(message: str) -> None:
    """Writes ``error: ...`` to stderr."""
    say(f"{coloured('error', err=True)}: {message}", err=True)


def summary_line(summary: Mapping[str, Any], run_dir: str | Path) -> str:
    """Summary of a run: settings, status, returns, directory; one line, wrapped on a narrow terminal."""
    what = " ".join(str(summary.get(k, "?")) for k in ("env", "model", "size"))
    parts = [f"{what} seed {summary.get('seed', '?')}: {coloured(str(summary.get('status', 'unknown')))}"]
    if _is_number(summary.get("final_return")):
        returns = f"final return {summary['final_return']:.1f}"
        if _is_number(summary.get("peak_return")):
            returns += f" (peak {summary['peak_return']:.1f}"
            if _is_number(summary.get("random_return")):
                returns += f", random {summary['random_return']:.1f}"
            returns += ")"
        parts.append(returns)
    if _is_number(summary.get("validation_loss")):
        parts.append(f"validation loss {summary['validation_loss']:.4g} (best {summary['best_validation_loss']:.4g})")
    if "epochs_done" in summary:
        parts.append(f"epochs {summary['epochs_done']}/{summary.get('epochs_planned', '?')}")
    if _is_number(summary.get("wall_clock_s")):
        minutes, seconds = divmod(round(summary["wall_clock_s"]), 60)
        parts.append(f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s")
    return joined([*parts, str(run_dir)])


def resume_hint(script: str, overrides: Sequence[str], run_dir: Path, status: str = "stopped") -> str:
    """The command that resumes a run, with what to change first."""
    words = [w for w in overrides if not w.startswith(("run_dir=", "runs_dir="))]
    remedy = f" {_REMEDIES[status]}" if status in _REMEDIES else ""
    return f"to resume{remedy}: {typed_here(script)} " + shlex.join([*words, f"run_dir={run_dir}"])


def next_lines(mode: str, run_dir: Path, store: str | None = None) -> str:
    """The next commands for a run that has finished; ``store`` is the path of a pre-training's episodes."""
    here = Path.cwd()
    run = run_dir.relative_to(here) if run_dir.is_relative_to(here) else run_dir
    names = {"RUN": shlex.quote(str(run)), "STORE": shlex.quote(str(store))}
    lines = ["next:"]
    for script, words, _ in what_next(mode):
        typed = re.sub("RUN|STORE", lambda found: names[found[0]], words)
        lines.append(f"  {typed_here(script)} {typed}")
    return "\n".join(lines)


def fail(message: str, status: str, script: str, overrides: Sequence[str], run_dir: Path) -> int:
    """Prints the error of a run and, if it can help, the command that resumes it.

    Returns:
        The exit code.
    """
    error(message)
    if status in _REMEDIES:
        say(resume_hint(script, overrides, run_dir, status), err=True)
    return EXIT_CODES.get(status, FAILED)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
