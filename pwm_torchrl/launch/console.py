"""What the entry points share: error sentences, exit codes, the summary line."""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pwm_torchrl.errors import ConfigurationError

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "OK",
    "STOPPED",
    "command",
    "error",
    "is_ours",
    "resume_hint",
    "say",
    "summary_line",
]

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130

Main = Callable[[Sequence[str] | None], int]


def command(main: Main) -> Main:
    """Makes a ``main(argv)`` end with a sentence and exit code 2 on bad input, and quietly on
    Ctrl-C.
    """

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
            # The reader (head, less) has enough; keep Python from complaining when it flushes at
            # exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK

    return wrapped


def say(message: str, *, err: bool = False) -> None:
    """Writes a line to stdout, or to stderr."""
    stream = sys.stderr if err else sys.stdout
    stream.write(message + "\n")
    stream.flush()


def error(message: str) -> None:
    """Writes ``error: ...`` to stderr."""
    say(f"error: {message}", err=True)


def is_ours(exception: BaseException) -> bool:
    """Whether an exception is one of the package's own, whose message says all there is to say."""
    return any(c.__module__.split(".")[0] == "pwm_torchrl" for c in type(exception).__mro__)


def summary_line(summary: Mapping[str, Any], run_dir: str | Path) -> str:
    """One line: what ran, how it ended, how good it is, where it is."""
    what = " ".join(str(summary.get(k, "?")) for k in ("env", "model", "size"))
    parts = [f"{what} seed {summary.get('seed', '?')}: {summary.get('status', 'unknown')}"]
    if _is_number(summary.get("final_return")):
        returns = f"final return {summary['final_return']:.1f}"
        if _is_number(summary.get("peak_return")):
            returns += f" (peak {summary['peak_return']:.1f}"
            if _is_number(summary.get("random_return")):
                returns += f", random {summary['random_return']:.1f}"
            returns += ")"
        parts.append(returns)
    if "epochs_done" in summary:
        parts.append(f"epochs {summary['epochs_done']}/{summary.get('epochs_planned', '?')}")
    if _is_number(summary.get("wall_clock_s")):
        minutes, seconds = divmod(round(summary["wall_clock_s"]), 60)
        parts.append(f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s")
    return " · ".join([*parts, str(run_dir)])


def resume_hint(script: str, overrides: Sequence[str], run_dir: Path) -> str:
    """The command that continues a run."""
    words = [w for w in overrides if not w.startswith(("run_dir=", "runs_dir="))]
    return "to resume: " + shlex.join(["python", f"launch/{script}", *words, f"run_dir={run_dir}"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
