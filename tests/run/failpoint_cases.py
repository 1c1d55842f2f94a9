"""Attempts at a small run in processes of their own, which may be killed; forked from one that imported everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from forked_runs import forked, quickly
from training_cases import config

from pwm_torchrl.config import Config
from pwm_torchrl.run.checkpoints import SEAL_FILE, CheckpointStore
from pwm_torchrl.run.debugging import VARIABLE
from pwm_torchrl.run.loop import Loop
from pwm_torchrl.run.stop import StopRequest
from pwm_torchrl.training import train

NETWORKS = (
    "model",
    "actor",
    "critic",
    "optimizer_model",
    "optimizer_actor",
    "optimizer_critic",
    "replay",
)


def small() -> Config:
    """Five epochs of two Pendulums, a checkpoint every two."""
    changes = {
        "training.epochs": 5,
        "training.eval_every": 3,
        "training.eval_episodes": 1,
        "training.gradient_profile_every": 0,
        "training.check_graphs": False,
        "training.replay_capacity": 40,
        "env.episode_length": 10,
        "algorithm.critic_passes": 1,
    }
    return config(changes)


def attempt(run_dir: str, failpoint: str | None, stop: bool) -> None:
    """What a process does: start the run or go on with it."""
    quickly()
    if failpoint is not None:
        os.environ[VARIABLE] = failpoint
    request = StopRequest()
    if stop:
        update = Loop.update

        def stopping(self: Loop) -> None:
            if self.epoch == 2:
                made = self.algorithm.update_model
                self.algorithm.update_model = lambda row: (made(row), request.ask("test"))
            update(self)

        Loop.update = stopping
    folder = Path(run_dir)
    summary = train(small(), folder, resume=(folder / "summary.json").exists(), stop=request)
    os._exit(0 if summary["status"] == "finished" else 3)


def start(run_dir: Path, failpoint: str | None = None, stop: bool = False) -> multiprocessing.process.BaseProcess:
    """Start an attempt."""
    return forked(attempt, str(run_dir), failpoint, stop)


def run(run_dir: Path, failpoint: str | None = None, stop: bool = False) -> str:
    """An attempt to its end: ``finished``, ``stopped`` or ``killed``."""
    process = start(run_dir, failpoint, stop)
    process.join(120)
    assert process.exitcode in (0, 3, -signal.SIGKILL), process.exitcode
    return {0: "finished", 3: "stopped"}.get(process.exitcode, "killed")


def learned(run_dir: Path) -> dict[str, int]:
    """Checksums of all that training changed, from the newest checkpoint."""
    newest = CheckpointStore(run_dir).latest()
    assert newest is not None
    files = json.loads((newest / SEAL_FILE).read_text())["files"]
    return {name: facts["crc32"] for name, facts in files.items() if any(f"-{part}/" in name for part in NETWORKS)}
