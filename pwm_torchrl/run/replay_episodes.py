"""The episodes in a run's replay buffer, as a source for an import into a store.

The last checkpoint of a run has its replay buffer, with all steps of the run unless ``replay_capacity`` was smaller.
Observations and rewards in it are the environment's own, not normalised, and actions are in [-1, 1], as in stored
episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase

from pwm_torchrl.config import Config
from pwm_torchrl.data.episodes.own_files import episode_rows
from pwm_torchrl.data.episodes.sources import Advance
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows
from pwm_torchrl.data.layout import STORED_KEYS
from pwm_torchrl.data.replay import state_slots
from pwm_torchrl.data.segments import SegmentStore
from pwm_torchrl.envs.facts import TASK_MAKER
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore, load_checkpoint
from pwm_torchrl.run.directory import load_config

if TYPE_CHECKING:
    from pwm_torchrl.envs.tasks import TaskSet

__all__ = ["RunReplay"]


class _Saved:
    """Keeps a component's saved state as it is, so that a replay in RAM stays memory-mapped."""

    state: dict[str, Any]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class RunReplay:
    """The complete episodes in a run's replay as a source of :func:`~pwm_torchrl.data.episodes.import_sources`.

    Incomplete episodes are left out: the oldest of each environment if its steps were overwritten, the newest, and
    those that were cut off when the run was resumed. Only one environment's steps are read into memory at a time.

    Args:
        run (str or Path): the run's directory.
        task (str, optional): the task, if the run's environment is not a task of the registry. Defaults to ``None``.
        name (str, optional): name of the source. Defaults to ``None``, that of the directory.

    Attributes:
        size (int): bytes of the steps in the replay; 0 if there is none.

    Raises:
        ConfigurationError: if the run's configuration cannot be read.
    """

    def __init__(self, run: str | Path, task: str | None = None, name: str | None = None) -> None:
        self.run = Path(run)
        self.name = name or self.run.resolve().name
        self.cfg: Config = load_config(self.run)
        own = self.cfg.env.get("task") if self.cfg.env.get("_target_") == TASK_MAKER else None
        self.task = str(own) if own else task
        self._replay: _Replay | None = None
        try:
            self.size = self._opened().size
        except BadEpisodes:  # check() reports it
            self.size = 0

    def check(self, tasks: TaskSet) -> int:
        """Check the replay and the task; returns an upper bound of the number of rows.

        Raises:
            BadEpisodes: if the run has no replay, or its task is not in the set.
        """
        replay = self._opened()
        if self.task is None and len(tasks) > 1:
            raise BadEpisodes(
                f"trained in {self.cfg.env.get('name') or self.cfg.env.get('_target_')}, which is not a task of the "
                f"set {tasks.name}; name its task with --task NAME"
            )
        if self.task is not None:
            try:
                tasks.index(self.task)
            except ConfigurationError as error:
                raise BadEpisodes(str(error)) from error
        return 2 * replay.filled * replay.envs

    def digest(self, advance: Advance) -> str:
        """SHA-256 of the steps.

        Raises:
            BadEpisodes: if they cannot be read.
        """
        replay, found = self._opened(), hashlib.sha256()
        for env in range(replay.envs):
            steps = replay.steps_of(env)
            for key in STORED_KEYS:
                found.update(steps.get(key).contiguous().view(torch.uint8).numpy().data)
            advance(replay.size // replay.envs)
        return found.hexdigest()

    def blocks(self, tasks: TaskSet) -> Iterator[EpisodeRows]:
        """Yield the episodes, one environment after the other.

        Raises:
            BadEpisodes: at the first episode that cannot be imported, or if none is complete.
        """
        replay = self._opened()
        whole = self._whole_length(tasks)
        found = False
        for env in range(replay.envs):
            steps = replay.steps_of(env)
            ends = (steps["next", "done"].squeeze(-1).nonzero().squeeze(-1) + 1).tolist()
            # The first episode in the replay is incomplete if older steps were overwritten.
            for begin, end in pairwise(ends if replay.oldest else [0, *ends]):
                terminated = bool(steps["next", "terminated"][end - 1])
                if not terminated and end - begin != whole:
                    continue  # cut off where the run was resumed
                episode = steps[begin:end]
                last = episode["next", "observation"][-1:]
                values = {
                    "observation": torch.cat([episode["observation"], last]).numpy(),
                    "action": episode["action"].numpy(),
                    "reward": episode["next", "reward"].numpy(),
                    "terminated": terminated,
                }
                try:
                    yield episode_rows(values, tasks, self.task)
                except BadEpisodes as bad:
                    raise BadEpisodes(f"environment {env}, steps {begin} to {end}: {bad}") from bad
                found = True
        if not found:
            raise BadEpisodes(
                f"holds no complete episode: of {replay.filled:,} steps in each environment none has {whole:,} from a "
                "reset on; train longer, or with a larger training.replay_capacity"
            )

    def _whole_length(self, tasks: TaskSet) -> int:
        """Steps of an episode that reaches the time limit."""
        own = self.cfg.env.get("episode_length")
        return int(own or tasks.tasks[tasks.index(self.task or tasks.names[0])].episode_length)

    def _opened(self) -> _Replay:
        if self._replay is not None:
            return self._replay
        if self.cfg.mode != "online":
            raise BadEpisodes(f"has no replay: its mode is {self.cfg.mode}, which reads stored episodes")
        saved = _Saved()
        try:
            load_checkpoint(CheckpointStore(self.run).pick("last"), {"replay": saved})
            self._replay = _Replay(self.run, saved.state)
        except (ConfigurationError, CheckpointFault, StorageFault) as error:
            raise BadEpisodes(f"has no readable replay: {error}") from error
        return self._replay


class _Replay:
    """Reads steps in chronological order from the saved state of a replay in RAM or on disk."""

    def __init__(self, run: Path, state: Mapping[str, Any]) -> None:
        self.disk: SegmentStore | None = None
        self.slots: TensorDict | None = None  # [slots, environments], mapped
        if "writer" in state:
            self.envs, self.filled = int(state["envs"]), int(state["filled"])
            if state["steps"]:
                self.disk = SegmentStore(run / "replay", self.filled, self.envs, 1)
                self.disk.load_state_dict(dict(state), read_only=True)
        elif state["data"]:
            self.slots = state_slots(state["data"])
            self.filled, self.envs = self.slots.batch_size
        if self.disk is None and self.slots is None:
            raise BadEpisodes("has an empty replay: the run has collected nothing")
        self.oldest = int(state["steps"]) - self.filled
        step = self.steps_of(0, 1)
        self.size = self.filled * self.envs * sum(step.get(key).nbytes for key in STORED_KEYS)

    def steps_of(self, env: int, count: int | None = None) -> TensorDictBase:
        """The oldest ``count`` steps of an environment, or all of them, ``[count]``."""
        count = self.filled if count is None else count
        if self.disk is not None:
            return self.disk.get(torch.tensor([self.oldest]), torch.tensor([env]), count)[0]
        assert self.slots is not None
        return self.slots[torch.arange(self.oldest, self.oldest + count) % self.filled, env]
