"""A run small enough for a test, and environments with known answers for it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase, GymWrapper

import pwm_torchrl.run.train as run_module
from pwm_torchrl.algorithm.base import MetricRow, find_algorithm
from pwm_torchrl.algorithm.build import Facts, build_optimizers
from pwm_torchrl.algorithm.pwm_paper import PaperWork
from pwm_torchrl.algorithm.updates import LocalExecutor, Updates
from pwm_torchrl.config import (
    AlgorithmConfig,
    Config,
    DynamicsConfig,
    MemoryConfig,
    ModelConfig,
    SizeConfig,
    TrainingConfig,
)
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.run.debugging import live_nodes
from pwm_torchrl.run.loop import Loop
from pwm_torchrl.run.train import Run

PENDULUM = {
    "_target_": "pwm_torchrl.envs.make_gymnasium_env",
    "name": "pendulum",
    "id": "Pendulum-v1",
    "num_envs": 2,
    "episode_length": 30,
}
CARTPOLE = {
    "_target_": "pwm_torchrl.envs.make_dm_control_env",
    "name": "cartpole_swingup",
    "domain": "cartpole",
    "task": "swingup",
    "num_envs": 2,
    "action_repeat": 2,
    "episode_length": 10,
}
DFLEX = {
    "_target_": "pwm_torchrl.envs.make_dflex_env",
    "module": "dflex_stand_in",
    "name": "dflex_hopper",
    "num_envs": 2,
    "episode_length": 10,
}
TIME_COLUMNS = ("wall_clock_s", "time/epoch_s")


def config(changes: dict[str, Any] | None = None, env: dict[str, Any] | None = None) -> Config:
    """A run of four epochs; ``changes`` by dotted key."""
    cfg = Config(
        model=ModelConfig(name="flow_v1", dynamics=DynamicsConfig(substeps=2)),
        size=SizeConfig(
            name="test", latent_dim=16, units=[16], encoder_units=[16], actor_units=[16], critic_units=[16]
        ),
        env=dict(PENDULUM if env is None else env),
        algorithm=AlgorithmConfig(
            horizon=4,
            actor_batch=8,
            model_batch=8,
            model_updates=2,
            first_model_updates=3,
            critic_passes=2,
            critic_minibatches=2,
        ),
        training=TrainingConfig(
            epochs=4,
            eval_every=2,
            eval_episodes=3,
            checkpoint_every=2,
            replay_capacity=1000,
            replay_storage="memory",
            gradient_profile_every=2,
            video=False,
            threads=1,
            progress=False,
            check_graphs=True,
        ),
        memory=MemoryConfig(kind="fixed"),
        device="cpu",
    )
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        owner: Any = cfg
        for name in path:
            owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(owner, dict):
            owner[last] = value
        else:
            assert hasattr(owner, last), f"no key {key}"
            setattr(owner, last, value)
    return cfg


def run_with(
    monkeypatch: pytest.MonkeyPatch,
    cfg: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    after_epoch: Callable[[Run], None] | None = None,
    during_epoch: Callable[[Run], None] | None = None,
) -> tuple[dict[str, Any], Run]:
    """``train`` with hooks: between an epoch's collection and its updates, and after it. Also gives the Run."""
    made: list[Run] = []

    class HookedLoop(Loop):
        def update(self) -> None:
            if during_epoch is not None:
                during_epoch(made[0])
            super().update()

        def finish(self) -> None:
            super().finish()
            if after_epoch is not None:
                after_epoch(made[0])

    class Kept(Run):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Loop", HookedLoop)
        patch.setattr(run_module, "Run", Kept)
        run_dir.mkdir(exist_ok=True)
        summary = run_module.train(cfg, run_dir, resume=resume)
    return summary, made[0]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a ``conftest.py`` to import: its runs leave no picture, which takes longer than the training itself.

    Module-wide runs are made before this applies and have real ones.
    """
    monkeypatch.setattr(run_module, "write_curves", lambda run_dir: (run_dir / "curves.png").touch())


def stop_after(epoch: int) -> Callable[[Run], None]:
    """A hook that asks for a stop after ``epoch``."""

    def stop(run: Run) -> None:
        if run.loop.epoch == epoch:
            run.stop.ask("test")

    return stop


def rows_of(run_dir: Path, without: tuple[str, ...] = TIME_COLUMNS) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` as text, sorted by column, so that equality means equal to the bit.

    Without what differs between equal runs: times, and the machine's memory.
    """
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [key for key in sorted(rows[0] if rows else {}) if key not in without and not key.startswith("memory/")]
    return [{key: row[key] for key in kept} for row in rows]


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """Every number that training changes: networks, their buffers and the optimizers' moments."""
    out = {}
    for name, network in run.networks.items():
        out |= {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}
        optimizer = run.components[f"optimizer_{name}"].state_dict()["state"]
        for index, state in optimizer.items():
            out |= {f"optimizer_{name}.{index}.{key}": value.clone() for key, value in state.items()}
    return out


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of a module's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def changed(module: torch.nn.Module, before: list[torch.Tensor]) -> list[bool]:
    """Which parameters differ from a snapshot."""
    return [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]


def trajectories(envs: int = 2, steps: int = 40, observation_dim: int = 3, action_dim: int = 1) -> TensorDict:
    """Random trajectories ``[N, T]`` of chained observations."""
    o = torch.randn(envs, steps + 1, observation_dim)
    flag = torch.zeros(envs, steps, 1, dtype=torch.bool)
    following = TensorDict(observation=o[:, 1:], reward=torch.randn(envs, steps, 1), done=flag, terminated=flag.clone())
    action = 2 * torch.rand(envs, steps, action_dim) - 1
    data = TensorDict(observation=o[:, :-1], action=action, next=following, batch_size=[envs, steps])
    data["next"].batch_size = [envs, steps]
    return data


class Bench:
    """A stepper over networks and replayed data, without an environment."""

    def __init__(self, cfg: Config, data: TensorDictBase | None = None, terminates: bool = False) -> None:
        torch.manual_seed(cfg.seed)
        self.data = trajectories() if data is None else data
        algorithm, facts = find_algorithm(cfg.algorithm.name), Facts(3, 1, terminates)
        self.networks = algorithm.build_networks(cfg, facts)
        if self.data["observation"].dtype == torch.float64:
            for _, network in self.networks.items():
                network.double()
        with torch.no_grad():  # last layers begin at or near 0, which would hide what depends on them
            torch.nn.init.orthogonal_(self.networks.actor.net[-1].weight, gain=2**0.5)
            for weight in list(self.networks.critic.params)[-2]:
                torch.nn.init.orthogonal_(weight, gain=2**0.5)
        self.losses = algorithm.build_losses(cfg, facts, self.networks)
        if self.losses.return_statistics is not None:
            self.losses.return_statistics.to(self.data["observation"].dtype)
        self.optimizers = build_optimizers(cfg, self.networks)
        self.replay = TrajectoryReplay(1000, self.data.shape[0], cfg.algorithm.slice_length)
        self.replay.extend(self.data)
        self.reduced: list[tuple[str, int, int]] = []
        updates = Updates(LocalExecutor(self.losses, self.optimizers), cfg.memory, self.reductions)
        self.algorithm = algorithm(
            cfg.algorithm, self.networks, self.losses, self.optimizers, self.replay, updates, first_model_updates=3
        )
        self.epochs, self.epoch = cfg.training.epochs, 0

    def step(self) -> dict[str, float]:
        """One epoch's updates; their metrics."""
        row = self.algorithm.epoch(self.data, self.epoch / max(1, self.epochs - 1))
        self.epoch += 1
        return row.numbers()

    def update_critic(self, rollout: TensorDictBase, row: MetricRow) -> None:
        """All passes over a rollout ``[B, H]``."""
        keys = self.losses.critic.tensor_keys
        states = rollout.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()
        passes = self.algorithm.cfg.critic_passes
        self.algorithm.update_critic(PaperWork(0, actor_updates=0, states=states, passes=passes, row=row))

    def reductions(self, update: str, refused: int, size: int, message: str) -> None:
        self.reduced.append((update, refused, size))

    def snapshots(self) -> dict[str, list[torch.Tensor]]:
        return {name: snapshot(network) for name, network in self.networks.items()}

    def changed(self, before: dict[str, list[torch.Tensor]]) -> dict[str, list[bool]]:
        return {name: changed(network, before[name]) for name, network in self.networks.items()}


class Clockwork(gymnasium.Env):
    """Observes its step count and last action, rewards the action; terminates after ``life`` steps.

    ``fail_at`` raises and ``nan_at`` returns NaN at that step of its lifetime, over all episodes. A list ``log``
    receives every reward.
    """

    log: list[float] | None = None

    def __init__(self, life: int, fail_at: int | None = None, nan_at: int | None = None) -> None:
        self.life, self.fail_at, self.nan_at = life, fail_at, nan_at
        self.steps = 0
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.start = self.np_random.uniform()
        return np.array([self.start, 0.0, 0.0], np.float32), {}

    def step(self, action):
        self.count += 1
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the spring\nbroke")
        observation = np.array([self.start, self.count, action[0]], np.float32)
        if self.steps == self.nan_at:
            observation[1] = np.nan
        return observation, float(action[0]) + self.start, self.count >= self.life, False, {}


def make_clockwork(seed: int, life: int = 7, fail_at: int | None = None, nan_at: int | None = None) -> EnvBase:
    """Faults only in training environments, whose seeds are below 5000 for seed 0."""
    if seed >= 5000:
        fail_at = nan_at = None
    return GymWrapper(Clockwork(life, fail_at, nan_at))


CLOCKWORK = {
    "_target_": "training_cases.make_clockwork",
    "name": "clockwork",
    "num_envs": 2,
    "episode_length": 30,
}


def live_graphs() -> int:
    """How many autograd nodes are alive."""
    return live_nodes().total()
