"""Generates episodes of the registry's tasks in TD-MPC2's format, with random and with trained policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.envs.factory import opened_env
from pwm_torchrl.envs.facts import TASK_MAKER
from pwm_torchrl.envs.tasks import TaskSet
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import replacing, storage_faults
from pwm_torchrl.run.evaluation import play
from pwm_torchrl.run.load import load_policy

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
