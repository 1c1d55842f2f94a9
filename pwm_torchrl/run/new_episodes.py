"""New episodes for a store: played by random and trained policies, or taken from a run's replay buffer.

Episodes that are played are of the registry's tasks, in TD-MPC2's format. The last checkpoint of a run has its replay
buffer, with all steps of the run unless ``replay_capacity`` was smaller. Observations and rewards in it are the
environment's own, not normalised, and actions are in [-1, 1], as in stored episodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.config import Config
from pwm_torchrl.data.episodes.own_files import episode_rows
from pwm_torchrl.data.episodes.sources import Advance
from pwm_torchrl.data.episodes.store import BadEpisodes, EpisodeRows
from pwm_torchrl.data.layout import STORED_KEYS
from pwm_torchrl.data.replay import state_slots
from pwm_torchrl.data.segments import SegmentStore
from pwm_torchrl.envs.factory import opened_env
from pwm_torchrl.envs.facts import TASK_MAKER
from pwm_torchrl.envs.tasks import TaskSet
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import replacing, storage_faults
from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore, load_checkpoint
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.run.evaluation import play
from pwm_torchrl.run.load import load_policy

__all__ = ["RANDOM", "Behaviour", "RunReplay", "generate_episodes"]

# Episodes played by policies ------------------------------------------------------------------------------------------


#: Episodes that are played in parallel.
BATCH = 32
RANDOM = "random"

Act = Callable[[TensorDictBase], TensorDictBase]


@dataclass(frozen=True)
class Behaviour:
    """The policy that acts in a share of a task's episodes.

    Attributes:
        policy (str): ``"random"``, uniform actions, or the directory of a run.
        hold (int): maximum number of steps for which a random action is repeated; the number is sampled for each action
            uniformly from 1 to ``hold``. Actions that change every step hardly move heavy bodies. Defaults to ``1``.
        noise (float): maximum standard deviation of the noise on a run's deterministic actions; the standard deviation
            is sampled for each episode uniformly from 0 to ``noise``. Defaults to ``0.3``.
    """

    policy: str
    noise: float = 0.3
    hold: int = 1


def generate_episodes(
    folder: str | Path,
    tasks: TaskSet,
    behaviours: Mapping[str, Sequence[Behaviour]],
    episodes: int,
    seed: int = 0,
    on_episodes: Callable[[int], None] | None = None,
) -> list[Path]:
    """Play episodes and write them as ``chunk_N.pt``, one file per task.

    A chunk is a TensorDict ``[episodes, T + 1]`` of ``obs``, ``action``, ``reward`` and ``task``, as TD-MPC2 publishes
    them (https://arxiv.org/abs/2310.16828): action and reward belong to the transition that led to the observation
    beside them, the first ones are NaN, and all is padded with zeros to the widest task. Existing files are kept, so
    that an interrupted command continues with the next task.

    Args:
        folder (str or Path): folder for the files; created if it does not exist.
        tasks (TaskSet): tasks to play; a task's index is its position.
        behaviours (mapping): behaviours by task name; each acts in an equal share of the task's episodes.
        episodes (int): number of episodes per task.
        seed (int): seed of environments, actions and noise. Defaults to ``0``.
        on_episodes (callable, optional): called with the number of episodes played since the last call.

    Returns:
        list of Path: the files, in the order of the tasks.

    Raises:
        ConfigurationError: if a policy is not a run, or its dimensions differ from the task's.
        MissingLibraryError: if a simulator is not installed.
    """
    folder = Path(folder)
    with storage_faults(folder, "write episodes to"):
        folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, info in enumerate(tasks.tasks):
        file = folder / f"chunk_{number}.pt"
        files.append(file)
        if file.exists():
            continue
        parts = []
        acting = behaviours[info.name]
        for place, behaviour in enumerate(acting):
            share = (episodes * (place + 1)) // len(acting) - (episodes * place) // len(acting)
            first = _seed(seed, number, place)
            parts += list(_played(info.name, behaviour, share, first, on_episodes))
        chunk = torch.cat([_padded(part, number, tasks) for part in parts])
        with (
            storage_faults(folder, "write episodes to"),
            replacing(file, durable=True) as draft,
            draft.open("wb") as opened,  # a file that torch.save opens contains its name, here a random one
        ):
            torch.save(chunk, opened)
    return files


def _seed(seed: int, task: int, place: int) -> int:
    """Seed of the first environment for a task and behaviour, far from the other seeds."""
    return 1_000_000 * (seed + 1) + 20_000 * task + 5_000 * place


def _played(
    task: str, behaviour: Behaviour, count: int, seed: int, on_episodes: Callable[[int], None] | None
) -> list[TensorDictBase]:
    """Episodes ``[n, T + 1]`` of one behaviour, unpadded."""
    policy = None if behaviour.policy == RANDOM else _policy(behaviour.policy, task)
    parts = []
    for begin in range(0, count, BATCH):
        size = min(BATCH, count - begin)
        with opened_env({"_target_": TASK_MAKER, "task": task}, num_envs=size, seed=seed + begin) as env:
            generator = torch.Generator().manual_seed(seed + begin)
            shape = env.action_spec.shape
            if policy is None:
                act = _random(behaviour.hold, shape, generator)
            else:
                act = _noisy(policy, behaviour.noise, shape, generator)
            episodes = play(env, act, seed + begin)
        if not episodes.valid.all():
            raise ConfigurationError(
                f"task {task!r} has episodes of different lengths, which TD-MPC2's format cannot hold; import its "
                "episodes from npz files instead"
            )
        observation = torch.cat([episodes.observation[:1], episodes.next_observation]).transpose(0, 1)
        filler = torch.full_like(episodes.action[:1], float("nan"))
        action = torch.cat([filler, episodes.action]).transpose(0, 1)
        reward = torch.cat([filler[..., :1], episodes.reward]).transpose(0, 1).squeeze(-1)
        parts.append(TensorDict(obs=observation, action=action, reward=reward, batch_size=reward.shape))
        if on_episodes is not None:
            on_episodes(size)
    return parts


def _policy(run: str, task: str) -> Act:
    """The policy of a run, checked against the task, whose environment takes actions in [-1, 1]."""
    try:
        with opened_env({"_target_": TASK_MAKER, "task": task}, num_envs=1, seed=0) as env:
            return load_policy(run, env=env)
    except ConfigurationError as error:
        raise ConfigurationError(f"--policy {task}={run}: {error}") from error


def _random(hold: int, shape: torch.Size, generator: torch.Generator) -> Act:
    """Uniform actions, each for 1 to ``hold`` steps."""
    action, left = torch.zeros(shape), torch.zeros(shape[0], 1, dtype=torch.int64)

    def act(state: TensorDictBase) -> TensorDictBase:
        nonlocal action, left
        fresh = torch.rand(shape, generator=generator) * 2 - 1
        steps = torch.randint(1, hold + 1, left.shape, generator=generator) if hold > 1 else torch.ones_like(left)
        action = torch.where(left == 0, fresh, action)
        left = torch.where(left == 0, steps, left) - 1
        return state.set("action", action)

    return act


def _noisy(policy: Act, noise: float, shape: torch.Size, generator: torch.Generator) -> Act:
    """A policy's actions with noise."""
    scale = noise * torch.rand(shape[0], 1, generator=generator)

    def act(state: TensorDictBase) -> TensorDictBase:
        action = policy(state.select("observation"))["action"]
        return state.set("action", (action + scale * torch.randn(shape, generator=generator)).clamp(-1.0, 1.0))

    return act


def _padded(part: TensorDictBase, task: int, tasks: TaskSet) -> TensorDictBase:
    """Pad to the widths of the task set, and add the task's index."""

    def widen(x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))

    action = widen(part["action"], tasks.action_dim)
    action[:, 0] = float("nan")
    return TensorDict(
        obs=widen(part["obs"], tasks.observation_dim),
        action=action,
        reward=part["reward"],
        task=torch.full(part.batch_size, task, dtype=torch.int32),
        batch_size=part.batch_size,
    )


# Episodes in a run's replay buffer ------------------------------------------------------------------------------------


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
