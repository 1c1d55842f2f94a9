"""``launch/pretrain.py``: a world model from stored episodes, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.help import answered
from pwm_torchrl.cli.preflight import preflight
from pwm_torchrl.cli.prepare import HERE
from pwm_torchrl.cli.train import run_in_process, run_replica
from pwm_torchrl.cli.validate import require_runnable
from pwm_torchrl.cli.words import read_words, with_preset
from pwm_torchrl.commands import named
from pwm_torchrl.distributed.rendezvous import is_replica
from pwm_torchrl.run.directory import prepare_run_dir

__all__ = ["main"]

SCRIPT = "pretrain"


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, with ``experiment=pretrain`` unless another is named, and pre-trains to the end.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130 stopped.
    """
    line = read_words(SCRIPT, argv or ())
    if answered(SCRIPT, line):
        return console.OK
    words = line.settings
    if is_replica():
        return run_replica()
    config = compose(with_preset(SCRIPT, words))
    if config.mode != "pretrain":
        raise console.ConfigurationError(
            f"{named(SCRIPT)} pre-trains world models, and this is mode={config.mode}; use {named('train')}"
        )
    require_runnable(config)
    preflight([config], HERE)
    return run_in_process(config, prepare_run_dir(config, here=True), words, script=SCRIPT)
