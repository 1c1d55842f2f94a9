"""The commands, ``pwm NAME`` or ``launch/NAME.py``, with the modules that parse their words and do their work.

Words are parsed by modules that do not import torch, so that typos are reported and help is printed at once: importing
torch takes seconds. The module that does a command's work is imported only after that. All such deferred imports are in
this module.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from pwm_torchrl import __version__
from pwm_torchrl.cli import console
from pwm_torchrl.errors import MissingLibraryError, nearest

__all__ = ["COMMANDS", "Command", "main", "run_command"]

#: Libraries of the extra ``launch``, by the names under which they are imported.
EXTRA = ("hydra", "omegaconf", "pandas", "psutil", "yaml", "safetensors", "scipy", "submitit", "rich")


class Command(NamedTuple):
    """A command.

    Attributes:
        summary (str): description in one line.
        stages (tuple of str): functions ``module:name`` of modules in ``pwm_torchrl.cli``. The first is called with the
            command's name and words, each later one with the result of the previous one. If a result is an exit code,
            the command ends.
    """

    summary: str
    stages: tuple[str, ...]


COMMANDS = {
    "submit": Command("train policies as jobs, of SLURM or of this machine", ("run_requests:parse", "submit:run")),
    "train": Command("train a policy in this process", ("run_requests:parse", "train:run")),
    "pretrain": Command("train a world model on stored episodes in this process", ("run_requests:parse", "train:run")),
    "plan": Command("show how much memory and time a run needs, and why", ("run_requests:parse", "prepare:plan")),
    "status": Command("list runs and the SLURM state of their jobs", ("arguments:parse", "status:run")),
    "resume": Command(
        "submit unfinished runs again", ("arguments:parse", "resume:find_runs_to_resume", "submit:resume")
    ),
    "evaluate": Command("evaluate trained policies in fresh environments", ("arguments:parse", "evaluate:run")),
    "report": Command(
        "write tables, curves and comparisons", ("arguments:parse", "report:find_content", "report_page:write")
    ),
    "data": Command("import, inspect or generate stored episodes", ("arguments:parse", "data:run")),
    "world_model": Command(
        "import a checkpoint, or show a saved world model", ("arguments:parse", "networks:world_model")
    ),
    "hub": Command("publish a run on the Hugging Face hub, or as a folder", ("arguments:parse", "networks:hub")),
    "check_env": Command("show an environment as training sees it", ("run_requests:parse", "prepare:check_env")),
    "doctor": Command("check this machine and a cluster profile, or draft one", ("run_requests:parse", "doctor:run")),
}  # fmt: skip
#: The last stage if ``--cfg job`` requests a configuration that must be completed first.
SHOW_CONFIG = "finalize:show_config"
_HELP = ("", "-h", "--help", "help")


def main() -> int:
    """``pwm NAME WORDS``; names may be written with hyphens or underscores."""
    name, *words = sys.argv[1:] or [""]
    if name in _HELP:
        console.say(_usage())
        return console.OK
    if name == "--version":
        console.say(f"pwm-torchrl {__version__}")
        return console.OK
    known = name.replace("-", "_")
    if known not in COMMANDS:
        near = nearest(known, COMMANDS).replace("_", "-")
        console.error(
            f"pwm {name}: there is no such command{f', did you mean {near}?' if near else ''}\n"
            f"commands: {', '.join(COMMANDS).replace('_', '-')}"
        )
        return console.BAD_INPUT
    return run_command(known, words)


def run_command(name: str, words: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        name (str): a key of :data:`COMMANDS`.
        words (sequence of str, optional): its words. Defaults to those of the command line.

    Returns:
        The exit code; 2 for bad input, or if a library that the commands need is not installed.
    """
    return console.command(partial(_run, name))(words)


def _run(name: str, words: Sequence[str] | None) -> int:
    first, *rest = COMMANDS[name].stages
    gc.disable()  # parsing creates thousands of small objects and hardly any garbage; this saves 8 % of --help's time
    try:
        asked = _find(first)(name, words or ())
    finally:
        gc.enable()
    for stage in rest:
        if isinstance(asked, int):
            break
        line = getattr(asked, "line", None)
        if line is None:
            asked = _find(stage)(asked)
            continue
        with _find("compose:add_profile_to_errors")([run.words for run in asked.runs]):
            asked = _find(SHOW_CONFIG if line.shows_config else stage)(asked)
    return int(asked)


def _find(function: str) -> Callable[..., Any]:
    """A stage's function.

    Raises:
        MissingLibraryError: if its module needs a library that is not installed.
    """
    module, _, name = function.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(f"pwm_torchrl.cli.{module}"), name)
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in EXTRA:
            raise
        raise MissingLibraryError(f"{library} is not installed; pip install 'pwm-torchrl[launch]'") from missing
    return found


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name.replace('_', '-'):<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: pwm COMMAND ...", "", *lines, "", "Help for one command: pwm COMMAND --help"])
