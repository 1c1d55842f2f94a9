"""Small runs and commands in processes of their own that get a signal in one of their phases; forked from one that is
warm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from forked_runs import forked, quickly
from training_cases import config

import pwm_torchrl.cli.prepare as preflight_module
import pwm_torchrl.run.load as load_module
import pwm_torchrl.run.new_episodes as generate_module
import pwm_torchrl.run.train as run_module
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.finalize import finalize
from pwm_torchrl.cluster.job import run_job
from pwm_torchrl.config import Config
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.run.directory import load_config, save_config
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.loop import Loop
from pwm_torchrl.run.validation import HeldOutValidation
from pwm_torchrl.training import train

#: Where a signal comes: before there is anything to save, in an epoch's updates, in an evaluation, in a checkpoint.
PHASES: dict[str, tuple[Any, str]] = {
    "warm_up": (run_module.Run, "__init__"),
    "update": (Loop, "update"),
    "evaluation": (PolicyEvaluation, "measure"),
    "validation": (HeldOutValidation, "measure"),
    "saving": (CheckpointStore, "save"),
}
#: The phases of each kind of run. The extraction is not evaluated: its simulator takes longer to import than it trains.
KINDS = {
    "online": ("warm_up", "update", "evaluation", "saving"),
    "pretrain": ("warm_up", "update", "validation", "saving"),
    "extract": ("warm_up", "update", "saving"),
}
#: What a run trained, by its kind.
TRAINED = {"online": ("actor", "critic", "model", "replay"), "pretrain": ("model",), "extract": ("actor", "critic")}
#: Commands that train nothing, and what in them gets the signal, the last time that it is called.
COMMANDS: dict[str, tuple[Any, str, int]] = {
    "evaluate": (load_module, "play", 1),
    "check_env": (preflight_module, "report_env", 1),
    "data": (generate_module, "play", 2),
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


def stored(kind: str, store: Path, world_model: Path | None = None) -> Config:
    """Three epochs of a pre-training, or of an extraction in what that made."""
    words = [
        f"experiment={kind}", f"data.path={store}", "algorithm.model_batch=8", "algorithm.actor_batch=8",
        "training.epochs=3", "training.eval_every=1", "training.checkpoint_every=1", "training.progress=false",
        "training.check_graphs=false", "training.video=false", "device=cpu",
    ]  # fmt: skip
    if kind == "pretrain":
        sizes = ("size.units=[16]", "size.encoder_units=[16]", "size.latent_dim=16")
        words = [word for word in words if "actor" not in word]
        words += [*sizes, "algorithm.model_updates=2", "data.validation_fraction=0.3"]
    else:
        sizes = ("size.actor_units=[16]", "size.critic_units=[16]")
        words = [word for word in words if "model_batch" not in word]
        words += [
            *sizes, f"world_model={world_model}", "task=cup-catch", "algorithm.actor_updates=2",
            "training.eval_episodes=0",
        ]  # fmt: skip
    return finalize(compose(words), words)


def _signalled(owner: Any, name: str, times: int, signum: int) -> None:
    """When it is called so many times, the process gets the signal."""
    original: Callable[..., Any] = getattr(owner, name)
    left = [times]

    def entered(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, entered)


def _as_started_by_a_shell() -> None:
    quickly()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def attempt(run_dir: str, path: str, phase: str | None, signum: int) -> None:
    """What a process does: start the run or go on with it, and get a signal in one of its phases."""
    _as_started_by_a_shell()
    if phase is not None:
        _signalled(*PHASES[phase], 1 if phase == "warm_up" else 2, signum)
    folder = Path(run_dir)
    if path == "job":
        with tempfile.TemporaryDirectory() as submitits:
            os.environ["SUBMITIT_FOLDER"] = submitits
            status = run_job(run_dir)["status"]
    else:
        status = train(load_config(folder), folder, resume=(folder / "summary.json").exists())["status"]
    os._exit({"finished": 0, "stopped": 3}[status])


def run(run_dir: Path, cfg: Config, path: str, phase: str | None = None, signum: int = 0) -> str:
    """An attempt to its end: ``finished`` or ``stopped``."""
    run_dir.mkdir(exist_ok=True)
    save_config(cfg, run_dir)
    process = forked(attempt, str(run_dir), path, phase, int(signum))
    process.join(240)
    assert process.exitcode in (0, 3), process.exitcode
    return {0: "finished", 3: "stopped"}[process.exitcode]


def _typed(name: str, words: Sequence[str], said: str, signum: int) -> None:
    """What a process does: run a command, and get a signal in it."""
    _as_started_by_a_shell()
    if signum:
        _signalled(*COMMANDS[name], signum)
    with open(said, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = run_command(name, words)
    os._exit(code)


def run_typed(name: str, words: Sequence[str], said: Path, signum: int = 0) -> int:
    """The exit code of a command, minus the signal if it died of that; what it said is in ``said``."""
    process = forked(_typed, name, list(words), str(said), int(signum))
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode
