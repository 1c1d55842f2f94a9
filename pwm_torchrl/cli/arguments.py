"""Parsers for the commands that take paths and options instead of settings. Does not import torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pwm_torchrl.cli import console
from pwm_torchrl.cli.command_line import HELP
from pwm_torchrl.commands import named, typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config

__all__ = ["STDOUT", "TASKS", "VIDEO_FILE", "ArgumentParser", "parse"]

VIDEO_FILE = "evaluation.mp4"
#: File name that stands for stdout.
STDOUT = "-"
#: Options with an optional file name, and its suffix; a following word without the suffix is a run.
_FILES = {"--json": ".json", "--video": ".mp4"}
_RUNS = "run directories, or folders that hold them"


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with this project's error messages."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`ConfigurationError` instead of printing the usage and exiting."""
        raise ConfigurationError(f"{message}; {' '.join(self.format_usage().split())}")


def parse(command: str, words: Sequence[str]) -> argparse.Namespace | int:
    """Parses the words of a command.

    Args:
        command (str): a command without settings, such as ``"evaluate"``.
        words (sequence of str): the words after it.

    Returns:
        Namespace or int: the parsed arguments, or the exit code if nothing is left to do.

    Raises:
        ConfigurationError: for invalid words.
        SystemExit: after help was given.
    """
    return _READERS[command](list(words))


# evaluate -------------------------------------------------------------------------------------------------------------


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
Unknown values are null.

Exit code: the highest of all runs; 0 evaluated, 1 failed, 2 bad input.

examples:
  EVALUATE runs/my_run --episodes 20
  EVALUATE runs/a runs/b --checkpoint last --json results.json
  EVALUATE runs/my_run --video
"""


def _evaluate(words: Sequence[str]) -> argparse.Namespace | int:
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
        const=STDOUT,
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
    args = parser.parse_intermixed_args(_with_optional_names(words))
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
        if file and file != STDOUT:
            _check_file(option, Path(file))
    return _of_runs(args)


def _of_runs(args: argparse.Namespace) -> argparse.Namespace | int:
    """``args``, or the exit code if none of its runs can be read; the errors are printed."""
    told = []
    for run in args.runs:
        try:
            load_config(run)
            return args
        except ConfigurationError as unreadable:
            told.append(unreadable)
    if args.json is not None:
        return args  # the JSON file must be written, with the errors
    for each in told:
        console.error(str(each))
    return console.BAD_INPUT


def _with_optional_names(argv: Sequence[str]) -> list[str]:
    """Rewrite ``--json RUN`` and ``--video RUN`` for argparse, so that RUN is parsed as a run, not as a file name."""
    words = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else ""
        named = following == STDOUT or (Path(following).suffix and not Path(following).is_dir())
        if word in _FILES and (not named or following.startswith("--")):
            word = f"{word}={STDOUT if word == '--json' else ''}"
        words.append(word)
    return words


def _check_file(option: str, file: Path) -> None:
    if file.suffix != _FILES[option]:
        raise ConfigurationError(f"{option}={file}: the name of the file must end in {_FILES[option]}")
    if file.is_dir() or not file.parent.is_dir():
        where = "is a directory" if file.is_dir() else f"cannot be written: there is no directory {file.parent}"
        raise ConfigurationError(f"{option}={file} {where}")


# data -----------------------------------------------------------------------------------------------------------------


_SOURCES = (
    "folder or file: *.pt (TD-MPC2's chunks), *.npz, *.h5 or *.hdf5 (your own episodes); minari:ID or minari:ID=TASK; "
    "or a run, whose replay is read"
)
TASKS = "mt30, mt80, names separated by commas, or a YAML list of names"
_TASK = "task of the episodes that do not name one"


def _usage_of_data() -> str:
    return f"""\
usage: {typed("data")} COMMAND ...

  import SOURCE... STORE --tasks TASKS   import TD-MPC2's chunks, your own episodes, Minari data sets
                                         or the replays of runs into a store
  inspect SOURCE|STORE [--tasks TASKS]   show the contents; check whether actions or rewards are shifted by a row
  generate ...                           record episodes of random or trained policies in TD-MPC2's format

Help for one command: {typed("data")} COMMAND --help"""


def _data(words: Sequence[str]) -> argparse.Namespace | int:
    if not words or (words[0] not in _DATA and not HELP.isdisjoint(words)):
        console.say(_usage_of_data())
        return console.OK
    if words[0] not in _DATA:
        raise ConfigurationError(f"{words[0]!r} is not a command of {named('data')}; choose one of {', '.join(_DATA)}")
    args = _DATA[words[0]](words[1:])
    args.command = words[0]
    return args


def _import(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=f"{typed('data')} import",
        description="Import episodes into a memory-mapped store; the same command continues an interrupted import.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store, new or of an unfinished import")
    parser.add_argument("--tasks", required=True, help=f"the tasks of the store: {TASKS}")
    parser.add_argument("--task", metavar="NAME", help=_TASK)
    parser.add_argument("--keep-good", action="store_true", help="finish the store without the invalid files")
    return parser.parse_args(words)


def _inspect(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=f"{typed('data')} inspect", description="Show the data of each task in a store or a source."
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE|STORE", help=f"a store; or a {_SOURCES}")
    parser.add_argument(
        "--tasks", help=f"tasks that a source refers to by number or name; not needed for a store: {TASKS}"
    )
    parser.add_argument("--task", metavar="NAME", help=_TASK)
    return parser.parse_args(words)


def _generate(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=f"{typed('data')} generate",
        description="Play episodes of the registry's tasks and write them in TD-MPC2's format, a chunk per task.",
    )
    parser.add_argument(
        "--tasks", required=True, metavar="SET", help="mt30, mt80, names separated by commas, or a YAML list"
    )
    parser.add_argument("--episodes", type=int, default=100, metavar="N", help="episodes per task (default 100)")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="[TASK=]RUN",
        help="'random'; 'random:N', which holds each action for 1 to N steps; or a run directory. TASK= limits it to "
        "one task. Several policies share a task's episodes equally (default: random)",
    )
    parser.add_argument(
        "--noise", type=float, default=0.3, metavar="STD", help="largest noise on a run's actions (default 0.3)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of environments and actions (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the chunks")
    args = parser.parse_args(words)
    if args.episodes < 1:
        raise ConfigurationError(f"--episodes={args.episodes} is too small; it must be at least 1")
    if args.noise < 0:
        raise ConfigurationError(f"--noise={args.noise:g} must not be negative")
    return args


_DATA: dict[str, Callable[[Sequence[str]], argparse.Namespace]] = {
    "import": _import,
    "inspect": _inspect,
    "generate": _generate,
}


# world_model, hub, resume, status, report -----------------------------------------------------------------------------


def _world_model(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog=typed("world_model"), description="Import or show a saved world model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    bring = commands.add_parser(
        "import",
        help="import a checkpoint in TD-MPC2's format",
        description="Import the world model of a checkpoint in TD-MPC2's format, {'model': state_dict}. Policy and "
        "value networks are left out, sizes are inferred from the tensors' shapes, task embedding and action "
        "masks are kept.",
    )
    bring.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the .pt file")
    bring.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, for world_model=FOLDER")
    bring.add_argument(
        "--tasks", metavar="SET", help="its tasks in order: mt30, mt80, names separated by commas, or a YAML list"
    )
    show = commands.add_parser("show", help="show tasks, dimensions and hash of a saved world model")
    show.add_argument("folder", type=Path, metavar="FOLDER", help="folder written by import, or a pre-training run")
    return parser.parse_args(words)


def _hub(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=typed("hub"), description="Publish a run on the Hugging Face hub, or export it to a folder."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    push = commands.add_parser(
        "push",
        help="upload a run to the Hugging Face hub",
        description="Upload weights (safetensors), configuration, metrics, curves, video and model card. The token "
        "comes from HF_TOKEN or `hf auth login`.",
    )
    export = commands.add_parser(
        "export",
        help="write the same weights and configuration to a folder",
        description="Write weights (safetensors) and configuration to a folder, which load_policy reads.",
    )
    for command in (push, export):
        command.add_argument("run", type=Path, metavar="RUN", help="run directory with a checkpoint")
        command.add_argument(
            "--checkpoint", default="best", metavar="WHICH", help="best (default), last, or the number of an epoch"
        )
    push.add_argument("repository", metavar="ORG/NAME", help="created if it does not exist")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--message", metavar="TEXT", help="commit message (default: the run's name)")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; new or empty")
    args = parser.parse_args(words)
    if args.command == "push" and args.repository.count("/") != 1:
        raise ConfigurationError(f"{args.repository} is not the name of a repository on the hub; write ORG/NAME")
    return args


def _resume(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=typed("resume"),
        description="Resubmit every unfinished run that is neither queued nor running.",
        epilog="KEY=VALUE: settings that may change, such as cluster.mem_gib; data.path or world_model after a move; "
        "and a larger training.epochs or training.steps, which also continues a finished run.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS|KEY=VALUE", help=f"{_RUNS}; settings to change")
    parser.add_argument("--failed", action="store_true", help="also resubmit runs that failed with an error")
    return parser.parse_args(words)


def _status(words: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog=typed("status"), description="One line per run: state, restarts, progress.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help=_RUNS)
    return parser.parse_args(words)


def _report(words: Sequence[str]) -> argparse.Namespace:
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
        help="keep only the newest finished run of those with the same settings and seed (wherever they ran), or the "
        "newest if none has finished",
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
    args = parser.parse_args(words)
    if args.compare is None and (args.baseline is not None or args.allow_differences):
        raise ConfigurationError("--baseline and --allow-differences need --compare KEY")
    return args


_READERS: dict[str, Callable[[Sequence[str]], argparse.Namespace | int]] = {
    "evaluate": _evaluate,
    "data": _data,
    "world_model": _world_model,
    "hub": _hub,
    "resume": _resume,
    "status": _status,
    "report": _report,
}
