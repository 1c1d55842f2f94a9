"""Runs that are small enough for a job of seconds, and an environment that misbehaves when it is told to."""

from __future__ import annotations

import csv
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from throwaway import Cluster

from pwm_torchrl.cli.entry import run_command

main = partial(run_command, "submit")

#: An environment of the user's own, in a folder of theirs.
USER_CODE = '''
import os, signal, subprocess, sys, time
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

WORD = "first"
HELD = []


class Pole(EnvBase):
    """Observes its step count and last action; ``trouble`` is a file that says what to do at which step."""

    def __init__(self, trouble):
        super().__init__(batch_size=[1])
        self.trouble, self.steps, self.count = trouble, 0, 0
        self.observation_spec = Composite(observation=Unbounded((1, 3)), shape=[1])
        self.action_spec = Bounded(-1.0, 1.0, (1, 1))
        self.reward_spec = Unbounded((1, 1))

    def _set_seed(self, seed):
        pass

    def _reset(self, tensordict=None, **kwargs):
        self.count = 0
        return TensorDict(observation=torch.zeros(1, 3), batch_size=[1])

    def _step(self, tensordict):
        self.count += 1
        self.steps += 1
        if Path(self.trouble).exists():
            what, at, *rest = Path(self.trouble).read_text().split()
            if self.steps >= int(at):
                getattr(self, what)(*rest)
        action = tensordict["action"]
        observation = torch.cat([torch.full((1, 1), 0.1 * self.count), action, torch.ones(1, 1)], -1)
        done = torch.zeros(1, 1, dtype=torch.bool)
        return TensorDict(
            observation=observation, reward=-action.abs(), done=done, terminated=done.clone(), batch_size=[1]
        )

    def save_state(self):
        return {"count": self.count, "steps": self.steps}

    def load_state(self, state):
        self.count, self.steps = state["count"], state["steps"]

    def slow(self, seconds):
        time.sleep(float(seconds))

    def grow(self, mib):
        if not HELD:
            HELD.append(bytearray(int(mib) << 20))
            HELD[0][::4096] = bytes(len(HELD[0][::4096]))

    def child_grows(self, mib):
        code = f"held = bytearray({int(mib)} << 20); held[::4096] = bytes(len(held[::4096]))"
        if subprocess.run([sys.executable, "-c", code]).returncode:
            raise RuntimeError("a worker died")

    def die(self, seen):
        if not Path(seen).exists():
            Path(seen).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def bug(self):
        raise KeyError("a bug")


def make(seed, trouble, num_envs=1):
    return Pole(trouble if seed < 5000 else trouble + ".none")


def word():
    print("the code said", WORD, flush=True)
'''

SMALL = [
    "env._target_=pole.make",
    "env.name=pole",
    "env.num_envs=1",
    "env.episode_length=20",
    "model=mlp",
    "size.latent_dim=8",
    "size.units=[8]",
    "size.encoder_units=[8]",
    "size.actor_units=[8]",
    "size.critic_units=[8]",
    "algorithm.horizon=4",
    "algorithm.actor_batch=4",
    "algorithm.model_batch=4",
    "algorithm.model_updates=1",
    "algorithm.first_model_updates=2",
    "algorithm=pwm_paper",
    "algorithm.critic_passes=1",
    "algorithm.critic_minibatches=1",
    "algorithm.random_steps=0",
    "training.eval_every=0",
    "training.eval_episodes=1",
    "training.video=false",
    "training.progress=false",
    "training.replay_capacity=1000",
    "training.checkpoint_every=3",
    "training.epochs=12",
    "training.gradient_profile_every=0",
    "cluster.mem_gib=1.2",
    "cluster.cpus=1",
    "cluster.time_min=5",
]


class Place:
    """A user's folder with code and runs, on a login node.

    Args:
        folder (Path): empty.
        cluster (Cluster): the throw-away one.
    """

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "pole.py").write_text(USER_CODE)
        self.trouble = folder / "trouble"

    def submit(self, *words: str, name: str = "run") -> tuple[Path, str]:
        """Submit one run; its directory and its job's id."""
        run_dir = self.folder / "runs" / name
        assert main([*SMALL, f"env.trouble={self.trouble}", f"run_dir={run_dir}", *words]) == 0
        return run_dir, self.job(run_dir)

    def job(self, run_dir: Path) -> str:
        """Id of a run's newest job."""
        return json.loads((run_dir / "job.json").read_text())["job_ids"][-1]

    def wait_for(self, run_dir: Path, status: str, timeout: float = 90.0) -> dict[str, Any]:
        """Wait until a run's summary has a status; returns the summary."""
        return self.until(lambda: summary(run_dir), lambda found: found.get("status") == status, run_dir, timeout)

    def wait_for_epoch(self, run_dir: Path, epoch: int, timeout: float = 60.0) -> None:
        """Wait until a run's metrics have an epoch."""
        self.until(lambda: last_epoch(run_dir), lambda found: found >= epoch, run_dir, timeout)

    def until(self, look: Any, accepts: Any, run_dir: Path, timeout: float) -> Any:
        """Look until what is seen is accepted."""
        end = time.monotonic() + timeout
        while not accepts(found := look()):
            assert time.monotonic() < end, f"{found}\n{self.told(run_dir)}"
            time.sleep(0.2)
        return found

    def told(self, run_dir: Path) -> str:
        """All that a run and its job said."""
        files = [run_dir / "log.txt", run_dir / "events.jsonl", *sorted(run_dir.glob("submitit/*.out"))]
        files += sorted(run_dir.glob("attempts/*"))
        texts = [f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files if file.is_file()]
        return "\n".join([self.cluster.run(["squeue", "--states=all"]).stdout, *texts])


def summary(run_dir: Path) -> dict[str, Any]:
    """A run's summary, empty before it has one."""
    file = run_dir / "summary.json"
    return json.loads(file.read_text()) if file.exists() else {}


def last_epoch(run_dir: Path) -> int:
    """The last epoch that a run has logged."""
    file = run_dir / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """A run's events of one kind."""
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_row(run_dir: Path) -> dict[str, str]:
    """The last row of a run's metrics."""
    return rows(run_dir)[-1]


def metrics(run_dir: Path) -> list[str]:
    """Lines of a run's metrics without times and memory."""
    skipped = ("wall_clock_s", "time/epoch_s")
    return [
        str([(k, v) for k, v in sorted(row.items()) if k not in skipped and not k.startswith("memory/")])
        for row in rows(run_dir)
    ]
