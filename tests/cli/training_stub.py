"""What the command line sees of training, without torch; the seed chooses how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types

SECONDS, BAD_INPUT, BUG, KILLED, SLOW, FAULT, NO_MEMORY, NO_DISK = 0, 2, 3, 4, 5, 6, 7, 8


FAKED = ("train", "evaluate_run", "film_run")


def fake_training() -> types.ModuleType:
    """A module to stand for ``pwm_torchrl.training``."""
    module = types.ModuleType("pwm_torchrl.training")
    vars(module).update({name: globals()[name] for name in FAKED})
    return module


def evaluate_run(run, episodes, seed, which):
    """The same returns for every run; one whose configuration has the seed of a fault fails."""
    from pwm_torchrl import errors
    from pwm_torchrl.run.directory import load_config

    fault = load_config(run).seed
    if fault == FAULT:
        raise errors.EnvironmentFault("pendulum", "reward is nan", seed=3)
    if fault == BUG:
        raise KeyError("a bug")
    print("chatter of a simulator")
    returns = [-150.0 + 12.5 * (-1) ** i for i in range(episodes)]
    found = {"return_mean": sum(returns) / episodes, "return_std": 12.5, "episodes": episodes, "returns": returns}
    return {**found, "seed": 7500 if seed is None else seed, "epoch": int(which) if which.isdecimal() else 3}


def film_run(run, file, seed, which):
    file.write_bytes(b"film")
    return file


def train(cfg, run_dir, *, resume=False, stop=None):
    """Prints a line per epoch, writes the run's files, and fails in the way that ``cfg.seed`` asks for."""
    from pwm_torchrl import errors

    done = len((run_dir / "metrics.csv").read_text().splitlines()) - 1 if resume else 0
    summary = {"model": cfg.model.name, "size": cfg.size.name, "env": cfg.env["name"], "seed": cfg.seed}
    summary.update(epochs_planned=cfg.training.epochs, status="running", epochs_done=done, wall_clock_s=1.0)

    def write(**changes):
        summary.update(changes)
        (run_dir / "summary.json").write_text(json.dumps(summary))

    write()
    print("resume" if resume else "fresh", os.environ.get("PWM_TORCHRL_PROGRESS_FILE") or "no state file", flush=True)
    if cfg.seed == BAD_INPUT:
        raise errors.ConfigurationError("algorithm.horizon=9 is longer than an episode")
    if cfg.seed == FAULT:
        raise type("Fault", (RuntimeError,), {"__module__": errors.__name__})("pendulum, seed 3: reward is nan")
    for seed, status, fault in (
        (NO_MEMORY, "memory", errors.OutOfMemory("the critic update does not fit")),
        (NO_DISK, "storage", errors.StorageFault("could not write segment_000001.bin")),
    ):
        if cfg.seed == seed:
            write(status=status)
            raise fault
    from pwm_torchrl.progress import progress_here

    with open(run_dir / "metrics.csv", "a") as metrics, progress_here(cfg.training.progress) as progress:
        progress.begin(cfg.training.epochs, done, 100 * done, 100 * cfg.training.epochs, {})
        if not resume:
            metrics.write("epoch,env_steps,eval/return_mean,eval/return_std\n")
        try:
            for epoch in range(done + 1, cfg.training.epochs + 1):
                metrics.write(f"{epoch},{epoch * 100},{-1000 + epoch},5.0\n")
                metrics.flush()
                progress.epoch(epoch, 100 * epoch, {"return": -1000.0 + epoch, "best": -500.0})
                print(f"epoch {epoch}", flush=True)
                summary["epochs_done"] = epoch
                if stop is not None and stop.reason is not None:
                    raise KeyboardInterrupt
                if cfg.seed == BUG:
                    raise KeyError("a bug\nwith lines")
                if cfg.seed == KILLED:
                    os.kill(os.getpid(), signal.SIGKILL)
                if cfg.seed == SLOW and not resume:
                    time.sleep(0.1)
        except KeyboardInterrupt:
            print("saving", flush=True)
            time.sleep(1.5)  # longer than submitit waits between SIGINT and SIGKILL
            write(status="stopped")
            return summary
    print("done", file=sys.stderr, flush=True)
    write(status="finished", peak_return=-100.0, final_return=-120.0, random_return=-1200.0)
    return summary
