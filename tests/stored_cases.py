"""Small stores of episodes for runs in tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pwm_torchrl.data.episodes import EpisodeRows, StoreWriter
from pwm_torchrl.envs.tasks import task_set


def write_store(
    path: Path,
    names: Sequence[str] = ("pendulum-swingup", "cup-catch"),
    episodes: int = 6,
    length: int = 20,
    seed: int = 0,
) -> Path:
    """A store with ``episodes`` episodes of each task: a linear system, rewarded with its first observation."""
    rng = np.random.default_rng(seed)
    tasks = task_set(names)
    count = episodes * len(tasks)
    observation = np.zeros((count, length + 1, tasks.observation_dim), np.float32)
    action = np.zeros((count, length + 1, tasks.action_dim), np.float32)
    label = np.arange(count) % len(tasks)
    for episode, task in enumerate(label):
        o, a = tasks.observation_dims[task], tasks.action_dims[task]
        action[episode, 1:, :a] = rng.uniform(-1, 1, (length, a))
        observation[episode, 0, :o] = rng.uniform(-1, 1, o)
        for t in range(length):
            observation[episode, t + 1, :o] = 0.9 * observation[episode, t, :o] + 0.1 * action[episode, t + 1, 0]
    reward = observation[..., 0].copy()
    reward[:, 0] = 0
    rows = EpisodeRows(
        observation.reshape(-1, tasks.observation_dim),
        action.reshape(-1, tasks.action_dim),
        reward.reshape(-1),
        np.full(count, length),
        label,
    )
    with StoreWriter(path, tasks) as writer:
        writer.append(rows)
        writer.commit([{"name": "test", "state": "imported"}])
        writer.finish()
    return path
