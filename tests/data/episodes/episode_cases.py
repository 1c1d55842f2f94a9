"""Stores and sources for tests: random episodes of a few tasks of different dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

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


def chunk(episodes: int, steps: int, task: list[int], seed: int = 0, of: TaskSet | None = None) -> TensorDict:
    """A chunk in TD-MPC2's layout, ``[episodes, steps]``."""
    of = of or tasks()
    rows = random_rows([steps - 1] * episodes, task, seed, of=of)
    action, reward = (torch.from_numpy(x).view(episodes, steps, *x.shape[1:]) for x in (rows.action, rows.reward))
    action[:, 0], reward[:, 0] = torch.nan, torch.nan
    return TensorDict(
        obs=torch.from_numpy(rows.observation).view(episodes, steps, -1),
        action=action,
        reward=reward,
        task=torch.tensor(task, dtype=torch.int32).unsqueeze(1).repeat(1, steps),
        batch_size=[episodes, steps],
    )


def write_chunks(folder: Path, count: int = 3, episodes: int = 4, steps: int = 6) -> list[TensorDict]:
    """``chunk_0.pt``, ... with every task of the set in each."""
    folder.mkdir(exist_ok=True)
    chunks = [chunk(episodes, steps, [(n + e) % 3 for e in range(episodes)], seed=n) for n in range(count)]
    for number, content in enumerate(chunks):
        torch.save(content, folder / f"chunk_{number}.pt")
    return chunks


def digest_of(store: Path) -> dict[str, bytes]:
    """Content of the data files."""
    return {path.name: path.read_bytes() for path in sorted(store.iterdir()) if path.suffix in (".f32", ".npy", ".u8")}
