"""The console commands of an installed package, ``pwm-train`` and the others: one for each script of ``launch/``."""

from __future__ import annotations

import importlib
from functools import partial

from pwm_torchrl.cli import console

__all__ = [
    "check_env",
    "data",
    "doctor",
    "evaluate",
    "hub",
    "plan",
    "pretrain",
    "report",
    "resume",
    "status",
    "submit",
    "train",
    "world_model",
]

#: Libraries of the extra ``launch``, by the names under which they are imported.
EXTRA = ("hydra", "omegaconf", "pandas", "psutil", "yaml", "safetensors", "scipy", "submitit", "rich")


def run(name: str) -> int:
    """Calls a command's ``main`` with the words of the command line.

    Returns:
        The exit code; 2 if the package is installed without what its command line needs.
    """
    try:
        main = importlib.import_module(f"pwm_torchrl.cli.{name}").main
    except ModuleNotFoundError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in EXTRA:
            raise
        console.error(f"{library} is not installed; pip install 'pwm-torchrl[launch]'")
        return console.BAD_INPUT
    return int(main())


check_env = partial(run, "check_env")
data = partial(run, "data")
doctor = partial(run, "doctor")
evaluate = partial(run, "evaluate")
hub = partial(run, "hub")
plan = partial(run, "plan")
pretrain = partial(run, "pretrain")
report = partial(run, "report")
resume = partial(run, "resume")
status = partial(run, "status")
submit = partial(run, "submit")
train = partial(run, "train")
world_model = partial(run, "world_model")
