"""``launch/train.py``: a run in this process."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_torchrl.cli import console
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.help import answered
from pwm_torchrl.cli.preflight import preflight
from pwm_torchrl.cli.prepare import HERE
from pwm_torchrl.cli.validate import require_runnable
from pwm_torchrl.cli.words import read_words
from pwm_torchrl.config import Config
from pwm_torchrl.distributed.rendezvous import is_replica
from pwm_torchrl.run.directory import RunDir, discard, prepare_run_dir
from pwm_torchrl.terminal import say_after_interrupt

__all__ = ["main", "run_in_process"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Composes a configuration, trains to the end and prints the result.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130 stopped.
    """
    line = read_words("train", argv or ())
    if answered("train", line):
        return console.OK
    words = line.settings
    if is_replica():
        return run_replica()
    config = compose(words)
    require_runnable(config)
    preflight([config], HERE)
    return run_in_process(config, prepare_run_dir(config, here=True), words, script="train")


def run_replica() -> int:
    """Computes for rank 0, which reads the configuration and says everything there is to say."""
    from pwm_torchrl.distributed.ranks import connected_ranks
    from pwm_torchrl.run.replica import serve
    from pwm_torchrl.run.train import quiet_torchrl

    quiet_torchrl()
    try:
        with connected_ranks() as ranks:
            if ranks is not None:
                serve(ranks)
    except Exception as failure:
        if not console.is_ours(failure):
            raise
        console.error(str(failure))
        return console.FAILED
    return console.OK


def run_in_process(config: Config, run: RunDir, words: Sequence[str], *, script: str) -> int:
    """Trains here; an error of the package ends in its sentence, a bug in its traceback."""
    from pwm_torchrl.training import train

    console.say(f"{'resuming' if run.resume else 'run'}: {run.path}")
    try:
        summary = train(config, run.path, resume=run.resume)
    except KeyboardInterrupt:
        say_after_interrupt(f"stopped; {console.resume_hint(script, words, run.path)}", err=True)
        return console.STOPPED
    except Exception as failure:
        if not console.is_ours(failure):
            raise
        refused = isinstance(failure, console.ConfigurationError)
        where = "" if refused and discard(run) else f"\nrun directory: {run.path}"
        code = console.fail(f"{failure}{where}", console.status_of(failure), script, words, run.path)
        return console.BAD_INPUT if refused else code
    console.say(console.summary_line(summary, run.path))
    status = str(summary.get("status"))
    if status == "stopped":
        console.say(console.resume_hint(script, words, run.path), err=True)
    return console.EXIT_CODES.get(status, console.FAILED)
