"""``launch/pretrain.py``: a world model from stored episodes, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_torchrl.commands import named
from pwm_torchrl.launch import console
from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.help import help_text, wants_help
from pwm_torchrl.launch.run_dir import prepare_run_dir
from pwm_torchrl.launch.train import run_in_process, run_replica
from pwm_torchrl.launch.validate import require_runnable
from pwm_torchrl.training.ranks import is_replica

__all__ = ["main", "with_experiment"]

SCRIPT = "pretrain"


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, with ``experiment=pretrain`` unless another is named, and pre-trains to the end.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130 stopped.
    """
    words = list(argv or ())
    if wants_help(words):
        console.say(help_text(SCRIPT))
        return console.OK
    if is_replica():
        return run_replica()
    config = compose(with_experiment(words))
    if config.mode != "pretrain":
        raise console.ConfigurationError(
            f"{named(SCRIPT)} pre-trains world models, and this is mode={config.mode}; use {named('train')}"
        )
    require_runnable(config)
    return run_in_process(config, prepare_run_dir(config), words, script=SCRIPT)


def with_experiment(words: Sequence[str]) -> list[str]:
    """The words, with a preset in front unless they choose one."""
    named = any(word.partition("=")[0] == "experiment" for word in words)
    return list(words) if named else ["experiment=pretrain", *words]
