"""Minari's data sets as a source of episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pwm_torchrl.data.episodes.own_files import episode_rows
from pwm_torchrl.data.episodes.rows import BadEpisodes, EpisodeRows
from pwm_torchrl.data.episodes.sources import Advance
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["PREFIX", "MinariData"]

PREFIX = "minari:"


class MinariData:
    """One data set of Minari that lies on this machine.

    Args:
        dataset_id (str): Minari's name of it, like ``"mujoco/hopper/expert-v0"``.
        task (str, optional): name of the task in the registry; a set of one task needs none. Defaults to ``None``.

    Raises:
        MissingLibraryError: if Minari is not installed.
        ConfigurationError: if the data set is not on this machine.
    """

    def __init__(self, dataset_id: str, task: str | None = None) -> None:
        try:
            import minari
        except ImportError as error:
            raise MissingLibraryError(
                f"{PREFIX}{dataset_id} needs Minari: pip install 'pwm-torchrl[minari]'"
            ) from error
        try:
            self.data: Any = minari.load_dataset(dataset_id)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigurationError(
                f"Minari has no data set {dataset_id!r} on this machine; get it with 'minari download {dataset_id}'"
            ) from error
        self.name = PREFIX + dataset_id
        self.task = task
        width = 4 * (_width(self.data.observation_space) + _width(self.data.action_space) + 1)
        self.size = int(self.data.total_steps) * width

    def check(self, tasks: TaskSet) -> int:
        """That observations and actions are vectors.

        Raises:
            BadEpisodes: if not.
        """
        for what, space in (("observations", self.data.observation_space), ("actions", self.data.action_space)):
            if len(getattr(space, "shape", None) or ()) != 1 or np.dtype(space.dtype).kind != "f":
                raise BadEpisodes(f"has {what} in {space}; vectors of floats are needed")
        return int(self.data.total_steps) + int(self.data.total_episodes)

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the arrays."""
        found = hashlib.sha256()
        for episode in self.data.iterate_episodes():
            for values in (episode.observations, episode.actions, episode.rewards, episode.terminations):
                array = np.ascontiguousarray(values)
                found.update(f"{array.dtype}{array.shape}".encode())
                found.update(array.tobytes())
            advance(len(episode.rewards) * self.size // max(1, int(self.data.total_steps)))
        return found.hexdigest()

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Its episodes, one at a time.

        Raises:
            BadEpisodes: at the first that cannot go into a store.
        """
        for number, episode in enumerate(self.data.iterate_episodes()):
            values = {
                "observation": episode.observations,
                "action": episode.actions,
                "reward": episode.rewards,
                "terminated": bool(np.asarray(episode.terminations)[-1:].any()),
            }
            try:
                yield episode_rows(values, tasks, self.task)
            except BadEpisodes as bad:
                raise BadEpisodes(f"episode {number}: {bad}") from bad


def _width(space: Any) -> int:
    return int(np.prod(getattr(space, "shape", None) or (1,)))
