"""A run, from its configuration to its summary."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pwm_torchrl.training.assembly import Run
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.config_file import CONFIG_FILE, save_config
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.lock import exclusive
from pwm_torchrl.training.summary import RunSummary


def train(cfg: Config, run_dir: Path | str, resume: bool = False) -> dict[str, Any]:
    """Train a policy to the end of its configuration, or to a stop.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): where everything is written; exists.
        resume (bool): continue from the newest readable checkpoint, or start again if there is none.
            Defaults to ``False``.

    Returns:
        dict: the summary that ``summary.json`` holds too. SIGINT ends the run after the epoch with status ``stopped``
        and a checkpoint.

    Raises:
        ConfigurationError: for a configuration that cannot work.
        EnvironmentFault: if an environment fails, after a checkpoint.
        DivergenceError: if a loss is not finite; the last checkpoint stays the newest.
    """
    run_dir = Path(run_dir)
    quiet_torchrl()
    with exclusive(run_dir):
        return _train(cfg, run_dir, resume)


def _train(cfg: Config, run_dir: Path, resume: bool) -> dict[str, Any]:
    if not (run_dir / CONFIG_FILE).exists():
        save_config(cfg, run_dir)
    summary = RunSummary.start(cfg, run_dir, resume)
    try:
        run = Run(cfg, run_dir, summary)
        status = run.execute(resume)
        result = summary.finish(status)
        run.draw()
        run.close()
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        summary.finish(status)
        write_event(run_dir, status, epoch=summary.epochs_done, error=f"{type(error).__name__}: {error}")
        raise
    write_event(run_dir, status, epoch=summary.epochs_done)
    return result


def quiet_torchrl() -> None:
    """Keep TorchRL's informational messages out of the progress display, unless RL_LOGGING_LEVEL asks for a level."""
    if "RL_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("torchrl").setLevel(logging.WARNING)
