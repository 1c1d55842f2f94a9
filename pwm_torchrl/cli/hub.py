"""``launch/hub.py``: a run's networks as a folder for others, or on the Hugging Face hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.cli import console
from pwm_torchrl.cli.evaluate import ArgumentParser
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError

__all__ = ["main"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Exports or uploads a run."""
    args = _parser().parse_args(argv)
    from pwm_torchrl.run import publish

    if args.command == "export":
        if args.folder.exists() and any(args.folder.iterdir()):
            raise ConfigurationError(f"{args.folder} is not empty; give a new folder")
        for file in publish.export_run(args.run, args.folder, args.checkpoint):
            console.say(str(file))
        return console.OK
    if args.repository.count("/") != 1:
        raise ConfigurationError(f"{args.repository} is not a repository of the hub; write ORG/NAME")
    url = publish.push_run(args.run, args.repository, args.checkpoint, private=args.private, message=args.message)
    console.say(f"uploaded: {url}")
    console.say(f'load_policy("hf://{args.repository}") loads it')
    return console.OK


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=typed("hub"), description="Runs for others: as a folder, or on the Hugging Face hub.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    push = commands.add_parser(
        "push",
        help="upload a run to the Hugging Face hub",
        description="Upload weights (safetensors), configuration, metrics, curves, video and model card. The token is "
        "HF_TOKEN, or that of `hf auth login`.",
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
    push.add_argument("--private", action="store_true", help="a repository that is created is private")
    push.add_argument("--message", metavar="TEXT", help="of the commit (default: the run's name)")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to; new or empty")
    return parser
