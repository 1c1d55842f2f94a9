"""``launch/check_env.py``: what training would see of an environment."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.help import answered
from pwm_torchrl.cli.words import read_words
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.terminal import coloured

__all__ = ["main"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, makes its environment and prints the report on it."""
    line = read_words("check_env", argv or ())
    if answered("check_env", line):
        return console.OK
    config = compose(line.settings)
    from pwm_torchrl.envs.facts import report_env

    try:
        console.say(report_env(config.env, config.env["num_envs"]))
        console.say(f"{coloured('ok')}: a run can use this environment")
    except Exception as failure:
        if not console.is_ours(failure) or isinstance(failure, ConfigurationError):
            raise
        console.error(str(failure))
        return console.FAILED
    return console.OK
