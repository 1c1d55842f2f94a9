"""``launch/hub.py``: exports a run's networks to a folder, or uploads them to the Hugging Face hub."""

from __future__ import annotations

from argparse import Namespace

from pwm_torchrl.cli import console
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run import publish

__all__ = ["run"]


def run(args: Namespace) -> int:
    """Exports or uploads a run."""
    if args.command == "export":
        if args.folder.exists() and any(args.folder.iterdir()):
            raise ConfigurationError(f"{args.folder} is not empty; give a new folder")
        for file in publish.export_run(args.run, args.folder, args.checkpoint):
            console.say(str(file))
        return console.OK
    url = publish.push_run(args.run, args.repository, args.checkpoint, private=args.private, message=args.message)
    console.say(f"uploaded: {url}")
    console.say(f'load_policy("hf://{args.repository}") loads it')
    return console.OK
