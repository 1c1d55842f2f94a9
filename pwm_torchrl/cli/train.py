"""``launch/train.py`` and ``launch/pretrain.py``: train a run in this process."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_torchrl import training
from pwm_torchrl.cli import console
from pwm_torchrl.cli.finalize import finalize
from pwm_torchrl.cli.prepare import HERE, preflight, refuse_slurm_keys
from pwm_torchrl.cli.run_requests import RunRequest
from pwm_torchrl.config import Config
from pwm_torchrl.distributed.ranks import connected_ranks
from pwm_torchrl.distributed.updates import serve
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import RunDir, discard, prepare_run_dir
from pwm_torchrl.run.train import quiet_torchrl
from pwm_torchrl.terminal import say_after_interrupt

__all__ = ["run", "run_in_process"]


def run(request: RunRequest) -> int:
    """Trains to the end and prints the result.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 74 disk full or broken, 75 out of memory, 130 stopped.
    """
    if not request.runs:
        return _compute_for_another()
    (run,) = request.runs
    config = finalize(run.config, run.words)
    refuse_slurm_keys(request.runs, HERE)
    preflight([config], HERE)
    return run_in_process(config, prepare_run_dir(config, here=True), request.words, script=request.script)


def _compute_for_another() -> int:
    """Computes shares of updates for rank 0, which reads the configuration and prints all output."""
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
    """Trains in this process; errors of the package are printed as a message, others are raised."""
    console.say(f"{'resuming' if run.resume else 'run'}: {run.path}")
    try:
        summary = training.train(config, run.path, resume=run.resume)
    except KeyboardInterrupt:
        say_after_interrupt(f"stopped; {console.resume_hint(script, words, run.path)}", err=True)
        return console.STOPPED
    except Exception as failure:
        if not console.is_ours(failure):
            raise
        refused = isinstance(failure, ConfigurationError)
        where = "" if refused and discard(run) else f"\nrun directory: {run.path}"
        code = console.fail(f"{failure}{where}", console.status_of(failure), script, words, run.path)
        return console.BAD_INPUT if refused else code
    console.say(console.summary_line(summary, run.path))
    status = str(summary.get("status"))
    if status == "stopped":
        console.say(console.resume_hint(script, words, run.path), err=True)
    return console.EXIT_CODES.get(status, console.FAILED)
