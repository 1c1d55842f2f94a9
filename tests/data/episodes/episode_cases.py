"""Stores and sources for tests: random episodes of a few tasks of different dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pwm_torchrl.data.episodes import EpisodeRows, EpisodeStore, StoreWriter
from pwm_torchrl.envs.tasks import TaskSet, task_set

#: Observation 3, 5 and 8 wide, actions 1, 1 and 2.
NAMES = ("pendulum-swingup", "cartpole-swingup", "cup-catch")


def tasks() -> TaskSet:
    return task_set(NAMES)


def random_rows(
    lengths: list[int], task: list[int], seed: int = 0, terminated: list[bool] | None = None, of: TaskSet | None = None
) -> EpisodeRows:
    """Random episodes, padded as the set asks."""
    of = of or tasks()
    rng = np.random.RandomState(seed)
    rows = sum(lengths) + len(lengths)
    observation = rng.randn(rows, of.observation_dim).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, of.action_dim)).astype(np.float32)
    reward = rng.rand(rows).astype(np.float32)
    length, label = np.array(lengths), np.array(task)
    for index, of_row in enumerate(np.repeat(label, length + 1)):
        observation[index, of.observation_dims[of_row] :] = 0
        action[index, of.action_dims[of_row] :] = 0
    found = EpisodeRows(
        observation, action, reward, length, label, None if terminated is None else np.array(terminated)
    )
    found.action[found.first], found.reward[found.first] = 0, 0
    return found


def make_store(path: Path, *parts: EpisodeRows, of: TaskSet | None = None) -> EpisodeStore:
    with StoreWriter(path, of or tasks()) as writer:
        for number, rows in enumerate(parts):
            writer.append(rows)
            writer.commit([{"name": str(number), "state": "imported"}])
        writer.finish()
    return EpisodeStore.open(path)
