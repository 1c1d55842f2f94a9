"""Environments with worker processes, in a fresh process whose signals are as a terminal gives them; prints JSON.

Run by test_workers.py: a process that has tested other things has threads, and helpers of multiprocessing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
from torchrl.envs import EnvBase, GymEnv, GymWrapper, ParallelEnv

from pwm_torchrl.envs import EnvironmentFault, workers
from pwm_torchrl.envs.workers import OpenEnv

SEED = 40


def pendulum() -> EnvBase:
    return GymEnv("Pendulum-v1")


def parallel(method: str, patience_s: float = 1.0) -> EnvBase:
    return ParallelEnv(2, pendulum, mp_start_method=method, shutdown_timeout=patience_s)


def asynchronous() -> EnvBase:
    make = [lambda: gymnasium.make("Pendulum-v1")] * 2
    return GymWrapper(gymnasium.vector.AsyncVectorEnv(make, autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED))


def alive(pid: int) -> bool:
    """Whether a process is there; one that has ended and waits for its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def opened_with(make: Callable[[], EnvBase]) -> tuple[OpenEnv, EnvBase, list[int]]:
    with OpenEnv.opening("pendulum", SEED) as opened:
        env = opened.hold(make())
    return opened, env, [worker.pid for worker in opened.workers]


def steps(env: EnvBase) -> int:
    """Steps of a short rollout of random actions."""
    return int(env.rollout(3, break_when_any_done=False).shape[-1])


def shielded(make: Callable[[], EnvBase]) -> dict[str, Any]:
    """A terminal's and a scheduler's signals reach every worker; then it closes in order."""
    opened, env, pids = opened_with(make)
    found: dict[str, Any] = {"workers": len(pids), "before": steps(env)}
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    found["after"] = steps(env)
    found["alive"] = [alive(pid) for pid in pids]
    opened.close()
    return {**found, "closed": env.is_closed, "left": [alive(pid) for pid in pids]}


def killed(make: Callable[[], EnvBase]) -> dict[str, Any]:
    """The second worker is killed between two steps."""
    opened, env, pids = opened_with(make)
    steps(env)
    os.kill(pids[1], signal.SIGKILL)
    found: dict[str, Any] = {"pids": pids}
    try:
        with opened.naming_dead_workers():
            steps(env)
    except EnvironmentFault as fault:
        found |= {"message": str(fault), "seed": fault.seed, "index": fault.index}
    opened.close()
    return {**found, "left": [alive(pid) for pid in pids]}


def hanging(make: Callable[[], EnvBase]) -> dict[str, Any]:
    """A worker that has stopped for ever, in the middle of a step that nobody waits for."""
    opened, env, pids = opened_with(make)
    steps(env)
    os.kill(pids[0], signal.SIGSTOP)
    opened.close()
    return {"left": [alive(pid) for pid in pids]}


def failing(make: Callable[[], EnvBase]) -> dict[str, Any]:
    """Something raises after the workers have started and before the environment is handed over."""
    pids: list[int] = []
    try:
        with OpenEnv.opening("pendulum", SEED):
            env = make()
            steps(env)
            pids += [worker.pid for worker in env._workers]
            raise ZeroDivisionError
    except ZeroDivisionError:
        return {"workers": len(pids), "left": [alive(pid) for pid in pids]}
    return {}


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What closes in order takes as long as a busy machine lets it; what cannot close is given up on soon.
    workers.CLOSE_S = 60.0
    in_order = {
        "spawned": shielded(lambda: parallel("spawn", 60.0)),
        "forked": shielded(lambda: parallel("fork", 60.0)),
        "asynchronous": shielded(asynchronous),
    }
    workers.CLOSE_S = 1.0
    out = {
        **in_order,
        "killed": killed(lambda: parallel("fork")),
        "killed_asynchronous": killed(asynchronous),
        "hanging": hanging(lambda: parallel("fork")),
        "failing": failing(lambda: parallel("fork")),
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    sys.stdout.write("\n" + json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
