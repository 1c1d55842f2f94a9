"""Small runs in processes of their own that get a signal in one of their phases; forked from one that is warm."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from forked_runs import forked, quickly, warm_up
from training_cases import config

import pwm_torchrl.run.train as run_module
from pwm_torchrl.cluster.job import run_job
from pwm_torchrl.config import Config
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.loop import Loop
from pwm_torchrl.training import train

#: Where a signal comes: before there is anything to save, in an epoch's updates, in an evaluation, in a checkpoint.
PHASES: dict[str, tuple[type, str]] = {
    "warm_up": (run_module.Run, "__init__"),
    "update": (Loop, "update"),
    "evaluation": (PolicyEvaluation, "measure"),
    "saving": (CheckpointStore, "save"),
}
#: How a run is started, and the signals that it is stopped by: Ctrl-C and kill, or a scheduler.
PATHS: dict[str, tuple[signal.Signals, ...]] = {
    "in_process": (signal.SIGINT, signal.SIGTERM),
    "job": (signal.SIGUSR2, signal.SIGTERM),
}


def small() -> Config:
    """Three epochs of two Pendulums, each evaluated and saved."""
    changes = {
        "training.epochs": 3,
        "training.eval_every": 1,
        "training.eval_episodes": 1,
        "training.checkpoint_every": 1,
        "training.gradient_profile_every": 0,
        "training.check_graphs": False,
        "env.episode_length": 10,
        "algorithm.model_updates": 1,
        "algorithm.first_model_updates": 1,
        "algorithm.critic_passes": 1,
    }
    return config(changes)


def _signalled(phase: str, signum: int) -> None:
    """The second time that the phase is entered, or the first one of the warm-up, the process gets the signal."""
    owner, name = PHASES[phase]
    original: Callable[..., Any] = getattr(owner, name)
    left = [1 if phase == "warm_up" else 2]

    def entered(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, entered)


def attempt(run_dir: str, path: str, phase: str | None, signum: int) -> None:
    """What a process does: start the run or go on with it, and get a signal in one of its phases."""
    quickly()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if phase is not None:
        _signalled(phase, signum)
    folder = Path(run_dir)
    if path == "job":
        with tempfile.TemporaryDirectory() as submitits:
            os.environ["SUBMITIT_FOLDER"] = submitits
            status = run_job(run_dir)["status"]
    else:
        status = train(small(), folder, resume=(folder / "summary.json").exists())["status"]
    os._exit({"finished": 0, "stopped": 3}[status])


def run(run_dir: Path, path: str, phase: str | None = None, signum: int = 0) -> str:
    """An attempt to its end: ``finished`` or ``stopped``."""
    run_dir.mkdir(exist_ok=True)
    save_config(small(), run_dir)
    process = forked(__file__, attempt, str(run_dir), path, phase, int(signum))
    process.join(240)
    assert process.exitcode in (0, 3), process.exitcode
    return {0: "finished", 3: "stopped"}[process.exitcode]


warm_up(small())
