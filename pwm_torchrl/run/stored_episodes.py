"""Runs on stored episodes: the tasks and facts that they take from them, and what they draw."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from pwm_torchrl.commands import named, typed
from pwm_torchrl.config import Config
from pwm_torchrl.data.episodes import EpisodeStore, SliceIndex, split_episodes, stage_store
from pwm_torchrl.devices import to_device
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.envs.facts import environment_facts
from pwm_torchrl.envs.tasks import TaskSet, task_info, task_set
from pwm_torchrl.errors import ConfigurationError, nearest
from pwm_torchrl.memory.readings import Reading, read_memory
from pwm_torchrl.memory.storage import store_bytes
from pwm_torchrl.modules import WorldModel, world_model_facts
from pwm_torchrl.modules.model_files import CONFIG_FILE as MODEL_FILE
from pwm_torchrl.run.directory import pretraining_run, read_summary, save_config

#: Splits a store; the same for every run, so that no run trains on what another validates with.
SPLIT_SEED = 0
#: Of each task, evenly spaced over its episodes, for mean and deviation: enough for two digits, and not all of 40 GB.
STATISTICS_ROWS = 50_000
#: Where SLURM and others put a node's own disk, the first that is set.
SCRATCH_VARIABLES = ("SLURM_TMPDIR", "TMPDIR")


def run_facts(cfg: Config, without_data: bool = False) -> EnvInfo:
    """Dimensions of what a run of any mode learns from: of its environment, or of its tasks as the registry knows them.

    Args:
        cfg (Config): the run.
        without_data (bool): whether a pre-training that names its tasks needs no stored episodes: to plan it before
            they are there. Defaults to ``False``.

    Raises:
        ConfigurationError: if environment or data are not there, disagree with the registry, or episodes are shorter
            than the horizon.
    """
    if cfg.mode == "pretrain":
        if without_data and cfg.data.path is None and cfg.tasks is not None:
            tasks = task_set(cfg.tasks)
            return _widths(tasks, max(task.episode_length for task in tasks.tasks))
        return pretraining_facts(cfg, open_store(cfg))
    if cfg.mode == "extract":
        return extraction_facts(cfg)
    info = environment_facts(cfg.env)
    check_horizon(cfg, info)
    return info


def check_horizon(cfg: Config, info: EnvInfo) -> None:
    """What only an environment can refute.

    Raises:
        ConfigurationError: if the horizon is longer than an episode.
    """
    horizon = cfg.algorithm.slice_length
    if info.episode_length is not None and horizon > info.episode_length:
        raise ConfigurationError(
            f"{cfg.algorithm.slice_key}={horizon} is longer than an episode of {info.name} "
            f"({info.episode_length} agent steps)."
        )


def open_store(cfg: Config, staged: bool = False) -> EpisodeStore:
    """The stored episodes of a run.

    Args:
        cfg (Config): ``data``.
        staged (bool): whether to copy them to the node's own disk first, if ``data.stage`` says so. Defaults to
            ``False``.

    Raises:
        ConfigurationError: if there are none, or there is no place to copy them to.
    """
    if cfg.data.path is None:
        raise ConfigurationError(f"mode={cfg.mode} learns from stored episodes; set data.path=STORE")
    path = Path(cfg.data.path).expanduser()
    if staged and cfg.data.stage == "scratch":
        path = stage_store(path, scratch_directory(cfg))
    return EpisodeStore.open(path)


def scratch_directory(cfg: Config) -> Path:
    """The node's own disk.

    Raises:
        ConfigurationError: if nothing says where it is.
    """
    given = [cfg.data.scratch_dir, *(os.environ.get(name) for name in SCRATCH_VARIABLES)]
    found = next((each for each in given if each), None)
    if found is None:
        raise ConfigurationError(
            f"data.stage=scratch needs a directory on the node's own disk: none of {', '.join(SCRATCH_VARIABLES)} is "
            "set; set data.scratch_dir=..."
        )
    return Path(found).expanduser()


def pretraining_tasks(cfg: Config, store: EpisodeStore) -> TaskSet:
    """The tasks of a pre-training, all of the store's unless the configuration names some.

    Raises:
        ConfigurationError: if the store lacks one, or has other dimensions for it than the registry.
    """
    tasks = task_set(cfg.tasks if cfg.tasks is not None else list(store.task_names))
    numbers = {name: store.task_names.index(name) for name in tasks.names if name in store.task_names}
    without = [name for name in tasks.names if name not in numbers or not np.any(store.task == numbers[name])]
    if without:
        raise ConfigurationError(
            f"data.path={store.path} has no episodes of {', '.join(without)}; import them, or name the tasks that it "
            "has, tasks=A,B"
        )
    for task in tasks.tasks:
        check_task(store, task.name)
    return tasks


def check_task(store: EpisodeStore, name: str) -> int:
    """The store's number of a task, whose dimensions are those of the registry.

    Raises:
        ConfigurationError: if it has no data of the task, or other dimensions.
    """
    if name not in store.task_names:
        near = nearest(name, store.task_names)
        raise ConfigurationError(
            f"data.path={store.path} has no data of task {name!r}" + (f"; did you mean {near}?" if near else "")
        )
    number = store.task_names.index(name)
    if not np.any(store.task == number):
        raise ConfigurationError(f"data.path={store.path} has no episodes of task {name!r}")
    info = task_info(name)
    found = (store.observation_dims[number], store.action_dims[number])
    if found != (info.observation_dim, info.action_dim):
        raise ConfigurationError(
            f"task {name!r} has {found[0]} observation and {found[1]} action dimensions in data.path={store.path}, and "
            f"{info.observation_dim} and {info.action_dim} in the task registry"
        )
    return number


def pretraining_facts(cfg: Config, store: EpisodeStore) -> EnvInfo:
    """Widths of a pre-training's padded observations and actions."""
    return _widths(pretraining_tasks(cfg, store), int(store.length.max()))


def _widths(tasks: TaskSet, episode_length: int) -> EnvInfo:
    return EnvInfo(
        name=tasks.name,
        observation_dim=tasks.observation_dim,
        action_dim=tasks.action_dim,
        episode_length=episode_length,
        action_repeat=1,
        num_envs=0,
        terminates=False,
        action_dims=tasks.action_dims,
    )


def extraction_facts(cfg: Config) -> EnvInfo:
    """Dimensions of the task of a policy extraction, which the world model and the store have to know.

    Raises:
        ConfigurationError: if one of them does not.
    """
    if cfg.world_model is None:
        raise ConfigurationError(
            "mode=extract needs a pre-trained world model; set world_model=DIRECTORY, that of a run of "
            f"{named('pretrain')} or of {named('world_model')} import"
        )
    if cfg.task is None:
        raise ConfigurationError("mode=extract needs a task; set task=NAME, or task=all for one run per task")
    model, info = world_model_facts(cfg.world_model), task_info(cfg.task)
    if model.task_names and info.name not in model.task_names:
        near = nearest(info.name, model.task_names)
        hint = f"did you mean {near}?" if near else f"it has {', '.join(model.task_names)}"
        raise ConfigurationError(f"world_model={cfg.world_model} was not trained on task {info.name!r}: {hint}")
    number = model.task_names.index(info.name) if model.task_names else 0
    trained = model.observation_dims[number] if model.observation_dims else info.observation_dim
    actions = model.spec.action_dims[number] if model.spec.num_tasks else model.spec.action_dim
    if (trained, actions) != (info.observation_dim, info.action_dim):
        raise ConfigurationError(
            f"world_model={cfg.world_model} has {trained} observation and {actions} action dimensions for task "
            f"{info.name!r}, the task registry {info.observation_dim} and {info.action_dim}"
        )
    check_task(open_store(cfg), info.name)
    return EnvInfo(
        name=info.name,
        observation_dim=info.observation_dim,
        action_dim=info.action_dim,
        episode_length=info.episode_length,
        action_repeat=info.action_repeat,
        num_envs=0,
        terminates=model.spec.termination,
    )


def follow_world_model(cfg: Config, run_dir: Path) -> None:
    """Find a world model that was moved, with the runs that belong to it, by its hash; written into ``cfg`` alone.

    It is looked for where the configuration says, then beside the run and one folder further up, two folders deep.

    Args:
        cfg (Config): of an extraction that knows its world model's hash; others are left as they are.
        run_dir (Path): its directory.
    """
    if cfg.world_model is None or cfg.world_model_sha256 is None:
        return
    given, above = Path(cfg.world_model).expanduser(), run_dir.absolute().parent
    patterns = ("*/" + MODEL_FILE, "*/*/" + MODEL_FILE, "*/*/*/" + MODEL_FILE)
    beside = (file.parent for folder in (above, above.parent) for each in patterns for file in folder.glob(each))
    for place in itertools.chain((given,), beside):
        with contextlib.suppress(ConfigurationError):
            if world_model_facts(place).sha256 == cfg.world_model_sha256:
                cfg.world_model = str(place)
                return


def pin_world_model(cfg: Config, run_dir: Path) -> None:
    """Write the hash of the world model into a run that was planned before there was one.

    Raises:
        ConfigurationError: if its pre-training has not come to an end.
    """
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return
    require_world_model(cfg)
    cfg.world_model_sha256 = world_model_facts(cfg.world_model).sha256
    save_config(cfg, run_dir)


def require_world_model(cfg: Config) -> None:
    """Whether the pre-training of a world model that the configuration does not pin has come to its end.

    Raises:
        ConfigurationError: if it has not.
    """
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return
    run = pretraining_run(cfg.world_model)
    status = "finished" if run is None else read_summary(run).get("status", "not begun")
    if run is not None and status != "finished":
        raise ConfigurationError(
            f"world_model={cfg.world_model} is not there yet, its pre-training is {status}; bring that to its end, "
            f"{typed('resume')} {run}, then this run"
        )


def require_slices(cfg: Config) -> None:
    """Whether every task of a run on stored episodes has an episode of ``algorithm.horizon`` steps to train on.

    Raises:
        ConfigurationError: if one has none.
    """
    store, chosen = open_store(cfg), None
    if cfg.mode == "pretrain":
        names, chosen = pretraining_tasks(cfg, store).names, training_split(cfg, store)[0]
    else:
        names = (str(cfg.task),)
    SliceIndex(
        store, cfg.algorithm.slice_length, tasks=[store.task_names.index(name) for name in names], episodes=chosen
    )


def training_split(cfg: Config, store: EpisodeStore) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the episodes for training and of those for validation, none of them if the share is 0."""
    if not cfg.data.validation_fraction:
        return np.arange(store.num_episodes), np.empty(0, np.int64)
    return split_episodes(store, cfg.data.validation_fraction, SPLIT_SEED)


class StoredSamples:
    """Slices and observations of some of a store's tasks, in the widths and with the task indices of a model.

    Drawing takes PyTorch's global random numbers, so that a resumed run goes on with the same draws.

    Args:
        store (EpisodeStore): the episodes.
        tasks (sequence of str): names of the tasks to draw from; a task's index is its place here.
        horizon (int): steps per slice.
        observation_dim (int): O of what is drawn; the store's padding beyond it is left out.
        action_dim (int): A of what is drawn.

    Keyword Args:
        episodes (array of int, optional): numbers of the episodes to draw from. Defaults to ``None``, all.
        balanced (bool): draw tasks with equal probability. Defaults to ``False``.
        labelled (bool): whether slices name their task. Defaults to ``True``.
        device (torch.device): where samples go. Defaults to the CPU.
        ahead (bool, optional): ask the disk for all pages of a batch at once. Defaults to ``None``: if the store is
            larger than the memory that could keep it, see :func:`outgrows_memory`.

    Drawing raises ConfigurationError if one of the tasks has no slice of ``horizon`` steps.
    """

    def __init__(
        self,
        store: EpisodeStore,
        tasks: Sequence[str],
        horizon: int,
        observation_dim: int,
        action_dim: int,
        *,
        episodes: np.ndarray | None = None,
        balanced: bool = False,
        labelled: bool = True,
        device: torch.device | str = "cpu",
        ahead: bool | None = None,
    ) -> None:
        self.store, self.tasks, self.horizon, self.labelled = store, tuple(tasks), horizon, labelled
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.device = torch.device(device)
        numbers = [store.task_names.index(name) for name in tasks]
        self.episodes = np.arange(store.num_episodes) if episodes is None else episodes
        self._balanced = balanced
        self._ahead = outgrows_memory(store) if ahead is None else ahead
        #: From the store's task numbers to places in ``tasks``; -1 where a task is not drawn.
        self._place = torch.full((len(store.task_names),), -1)
        self._place[numbers] = torch.arange(len(numbers))

    @functools.cached_property
    def index(self) -> SliceIndex:
        """Where slices begin."""
        numbers = [self.store.task_names.index(name) for name in self.tasks]
        return SliceIndex(self.store, self.horizon, tasks=numbers, episodes=self.episodes, balanced=self._balanced)

    @property
    def can_sample(self) -> bool:
        """Whether there is a whole slice."""
        return self.index.num_starts > 0

    @property
    def collected(self) -> int:
        """Transitions of the store."""
        return self.store.num_transitions

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``."""
        return self.slices(self.index.sample(count))

    def slices(self, rows: np.ndarray) -> TensorDictBase:
        """The slices that begin at ``rows``."""
        if self._ahead:
            self.store.prefetch(rows, self.horizon)
        slices = self.store.slices(rows, self.horizon)
        slices["observation"] = slices["observation"][..., : self.observation_dim]
        slices["next", "observation"] = slices["next", "observation"][..., : self.observation_dim]
        slices["action"] = slices["action"][..., : self.action_dim]
        if self.labelled:
            slices["task"] = self._place[slices["task"]]
        else:
            del slices["task"]
        return to_device(slices, self.device)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, uniform over all rows."""
        observations = self.store.observations(self.index.observation_rows(count))
        observations = observations[..., : self.observation_dim]
        return to_device(observations, self.device)

    def evenly_spaced_rows(self, name: str, most: int) -> np.ndarray:
        """At most so many rows of one task's episodes, int64, which no random numbers choose; no first rows."""
        number = self.store.task_names.index(name)
        return SliceIndex(self.store, 1, tasks=[number], episodes=self.episodes).evenly_spaced(most) + 1

    def of_task(self, name: str) -> SliceIndex | None:
        """The slices of one task among those drawn from; ``None`` if it has none."""
        number = self.store.task_names.index(name)
        long = self.store.length[self.episodes] >= self.horizon
        if not np.any((self.store.task[self.episodes] == number) & long):
            return None
        return SliceIndex(self.store, self.horizon, tasks=[number], episodes=self.episodes)


def take_observation_statistics(model: WorldModel, samples: StoredSamples) -> None:
    """Normalise the observations of each task as those of its episodes are distributed, where a model normalises them.

    Args:
        model (WorldModel): to be trained.
        samples (StoredSamples): of the model's tasks, in its order.
    """
    statistics = model.observation_statistics
    if statistics is None:
        return
    for place, name in enumerate(samples.tasks):
        rows = samples.evenly_spaced_rows(name, STATISTICS_ROWS)
        observations = samples.store.observations(rows)[:, : samples.observation_dim]
        statistics.set(observations, place if model.task is not None else None)


def take_reward_unit(model: WorldModel, samples: StoredSamples) -> None:
    """Compute in the deviation of the tasks' rewards, where a model has a unit of rewards.

    Args:
        model (WorldModel): to be trained; or bound to the one task of a policy extraction, whose critics compute in the
            unit of its own rewards, not in that of all tasks of the pre-training.
        samples (StoredSamples): of the tasks.
    """
    if model.reward_deviation is None:
        return
    rows = (samples.evenly_spaced_rows(name, STATISTICS_ROWS) for name in samples.tasks)
    rewards = torch.cat([samples.store.rewards(each) for each in rows])
    model.reward_deviation.set(model.reward.in_space(rewards))


def outgrows_memory(store: EpisodeStore, reading: Reading | None = None) -> bool:
    """Whether a store is larger than the memory that this process may use, its page cache included.

    Args:
        store (EpisodeStore): the episodes.
        reading (Reading, optional): memory. Defaults to ``None``, what there is now.
    """
    reading = read_memory() if reading is None else reading
    most = [group.limit for group in reading.limits if group.limit is not None]
    if reading.machine is not None:
        most.append(reading.machine.total)
    files, _ = store_bytes(store.path)
    return bool(most) and files > min(most)


class StoredEpochs:
    """Source of a trainer whose data are there already: epoch after epoch without any collection."""

    requested_frames_per_batch = 1  # the trainer's measure of an epoch
    init_random_frames = 0
    resumed_exactly = True

    def __iter__(self) -> Iterator[TensorDictBase]:
        while True:
            yield TensorDict({}, batch_size=[1])

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing runs beside."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing was kept."""
