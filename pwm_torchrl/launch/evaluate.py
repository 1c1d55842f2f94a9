"""``launch/evaluate.py``: the deterministic return of a trained policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.launch import console
from pwm_torchrl.launch.run_dir import load_config
from pwm_torchrl.own_code import make_cwd_importable

__all__ = ["ArgumentParser", "main"]

#: What is told beside the return, where it is known.
TOLD = {"success_rate": "success", "score": "score"}


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with this project's way of saying what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raises :class:`ConfigurationError` instead of printing the usage and exiting."""
        raise ConfigurationError(f"{message}; {self.format_usage().strip()}")


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates the best policy of a run on fresh environments and prints mean and spread."""
    parser = ArgumentParser(prog=typed("evaluate"), description="Deterministic return of a trained policy.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--episodes", type=int, default=10, metavar="N", help="episodes (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the environments (default: from the run's)")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise ConfigurationError(f"--episodes={args.episodes} is too small; it must be at least 1")
    make_cwd_importable()
    load_config(args.run)  # says in one sentence if this is no run directory
    from pwm_torchrl.training import evaluate_run

    try:
        result = evaluate_run(args.run, episodes=args.episodes, seed=args.seed)
    except Exception as failure:
        if not console.is_ours(failure) or isinstance(failure, ConfigurationError):
            raise
        console.error(str(failure))
        return console.FAILED
    mean, spread = (result[f"return_{k}"] for k in ("mean", "std"))
    more = "".join(f", {name} {result[key]:.2f}" for key, name in TOLD.items() if key in result)
    console.say(
        f"{args.run}: return {mean:.1f} ± {spread:.1f}{more} over {result.get('episodes', args.episodes)} episodes"
    )
    return console.OK
