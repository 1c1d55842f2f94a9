"""Runs on stored episodes: their tasks and dimensions, and the sampling of slices and observations."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDictBase
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

#: Seed of the split into training and validation; the same for every run, so that all hold out the same episodes.
SPLIT_SEED = 0
#: Rows per task, evenly spaced over its episodes, for mean and standard deviation: enough for two digits, without
#: reading a whole store of, for example, 40 GB.
STATISTICS_ROWS = 50_000
#: Environment variables with a directory on the node's local disk; the first one that is set is used.
SCRATCH_VARIABLES = ("SLURM_TMPDIR", "TMPDIR")


def run_facts(cfg: Config, without_data: bool = False) -> EnvInfo:
    """Dimensions and episode length of a run: of its environment or, in the other modes, of its tasks in the registry.

    Args:
        cfg (Config): the run.
        without_data (bool): whether to accept a pre-training without stored episodes if it names its tasks, so that it
            can be planned before they exist. Defaults to ``False``.

    Raises:
        ConfigurationError: if the environment or the data are missing or disagree with the registry, or episodes are
            shorter than the horizon.
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
    """Check the horizon against the environment's episode length.

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
        cfg (Config): the run; its section ``data`` is read.
        staged (bool): whether to copy them to the node's local disk first if ``data.stage=scratch``. Defaults to
            ``False``.

    Raises:
        ConfigurationError: if there are no stored episodes, or no directory to copy them to.
    """
    if cfg.data.path is None:
        raise ConfigurationError(f"mode={cfg.mode} learns from stored episodes; set data.path=STORE")
    path = Path(cfg.data.path).expanduser()
    if staged and cfg.data.stage == "scratch":
        path = stage_store(path, scratch_directory(cfg))
    return EpisodeStore.open(path)


def scratch_directory(cfg: Config) -> Path:
    """A directory on the node's local disk.

    Raises:
        ConfigurationError: if neither ``data.scratch_dir`` nor one of :data:`SCRATCH_VARIABLES` is set.
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
    """The tasks of a pre-training: those that the configuration names, else all tasks of the store.

    Raises:
        ConfigurationError: if the store has no episodes of a task, or other dimensions for it than the registry.
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
    """A task's number in the store; checks that the store and the registry agree on its dimensions.

    Raises:
        ConfigurationError: if the store has no data of the task, or other dimensions.
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
    """Dimensions of the task of a policy extraction; checks that the world model and the store have that task.

    Raises:
        ConfigurationError: if no world model or task is set, or the world model or the store does not have the task
            with the registry's dimensions.
    """
    if cfg.world_model is None:
        raise ConfigurationError(
            "mode=extract needs a pre-trained world model; set world_model=DIRECTORY, the directory of a run of "
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
    """Find a world model by its hash after it was moved together with its runs, and set ``cfg.world_model`` to it.

    Searches the configured path, then up to three levels below the run's parent directory and below the directory above
    that one. The run's ``config.yaml`` is not changed.

    Args:
        cfg (Config): the run; left unchanged unless it has ``world_model`` and ``world_model_sha256``.
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
    """Save the world model's hash in the configuration of a run that was planned before the world model existed.

    Raises:
        ConfigurationError: if its pre-training has not finished.
    """
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return
    require_world_model(cfg)
    cfg.world_model_sha256 = world_model_facts(cfg.world_model).sha256
    save_config(cfg, run_dir)


def require_world_model(cfg: Config) -> None:
    """Check that the pre-training of the world model has finished, unless the configuration already has its hash.

    Raises:
        ConfigurationError: if it has not finished.
    """
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return
    run = pretraining_run(cfg.world_model)
    status = "finished" if run is None else read_summary(run).get("status", "not begun")
    if run is not None and status != "finished":
        raise ConfigurationError(
            f"world_model={cfg.world_model} is not trained yet, its pre-training is {status}; finish it with "
            f"{typed('resume')} {run}, then resume this run"
        )


def require_slices(cfg: Config) -> None:
    """Check that every task of a run on stored episodes has a training episode of ``algorithm.horizon`` steps.

    Raises:
        ConfigurationError: if a task has none.
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
    """Numbers of the episodes for training and of those for validation; none are held out if the fraction is 0."""
    if not cfg.data.validation_fraction:
        return np.arange(store.num_episodes), np.empty(0, np.int64)
    return split_episodes(store, cfg.data.validation_fraction, SPLIT_SEED)


class StoredSamples:
    """Samples slices and observations of a store's tasks, with the widths and the task indices of a model.

    Sampling uses PyTorch's global generator, so that a resumed run continues with the same samples.

    Args:
        store (EpisodeStore): the episodes.
        tasks (sequence of str): names of the tasks to sample from; a task's index is its position here.
        horizon (int): steps per slice.
        observation_dim (int): O of the samples; the store's padding beyond it is cut off.
        action_dim (int): A of the samples.

    Keyword Args:
        episodes (array of int, optional): numbers of the episodes to sample from. Defaults to ``None``, all.
        balanced (bool): sample tasks with equal probability. Defaults to ``False``.
        labelled (bool): whether slices contain their task's index. Defaults to ``True``.
        device (torch.device): device of the samples. Defaults to the CPU.
        ahead (bool, optional): whether to prefetch all pages of a batch from the disk at once. Defaults to ``None``:
            only if the store does not fit into memory, see :func:`outgrows_memory`.

    Sampling raises ConfigurationError if one of the tasks has no slice of ``horizon`` steps.
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
        #: Maps the store's task numbers to positions in ``tasks``; -1 for a task that is not sampled.
        self._place = torch.full((len(store.task_names),), -1)
        self._place[numbers] = torch.arange(len(numbers))

    @functools.cached_property
    def index(self) -> SliceIndex:
        """Index of the rows at which slices may start."""
        numbers = [self.store.task_names.index(name) for name in self.tasks]
        return SliceIndex(self.store, self.horizon, tasks=numbers, episodes=self.episodes, balanced=self._balanced)

    @property
    def can_sample(self) -> bool:
        """Whether there is at least one slice."""
        return self.index.num_starts > 0

    @property
    def collected(self) -> int:
        """Number of transitions in the store."""
        return self.store.num_transitions

    def sample_slices(self, count: int) -> TensorDictBase:
        """Random slices, ``[count, horizon]``."""
        return self.slices(self.index.sample(count))

    def slices(self, rows: np.ndarray) -> TensorDictBase:
        """The slices that start at ``rows``, ``[len(rows), horizon]``."""
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
        """At most ``most`` evenly spaced rows of one task's episodes, int64, without the first row of an episode."""
        number = self.store.task_names.index(name)
        return SliceIndex(self.store, 1, tasks=[number], episodes=self.episodes).evenly_spaced(most) + 1

    def of_task(self, name: str) -> SliceIndex | None:
        """Index of one task's slices; ``None`` if it has none."""
        number = self.store.task_names.index(name)
        long = self.store.length[self.episodes] >= self.horizon
        if not np.any((self.store.task[self.episodes] == number) & long):
            return None
        return SliceIndex(self.store, self.horizon, tasks=[number], episodes=self.episodes)


def take_observation_statistics(model: WorldModel, samples: StoredSamples) -> None:
    """Set a model's observation statistics to those of each task's episodes; no-op if it does not normalise.

    Args:
        model (WorldModel): the model to be trained.
        samples (StoredSamples): samples of the model's tasks, in its order.
    """
    statistics = model.observation_statistics
    if statistics is None:
        return
    for place, name in enumerate(samples.tasks):
        rows = samples.evenly_spaced_rows(name, STATISTICS_ROWS)
        observations = samples.store.observations(rows)[:, : samples.observation_dim]
        statistics.set(observations, place if model.task is not None else None)


def take_reward_unit(model: WorldModel, samples: StoredSamples) -> None:
    """Set a model's reward unit to the standard deviation of the tasks' rewards; no-op if it has no reward unit.

    Args:
        model (WorldModel): the model to be trained; in a policy extraction, the view of one task, whose critics then
            use the unit of that task's rewards instead of that of all tasks of the pre-training.
        samples (StoredSamples): samples of the tasks.
    """
    if model.reward_deviation is None:
        return
    rows = (samples.evenly_spaced_rows(name, STATISTICS_ROWS) for name in samples.tasks)
    rewards = torch.cat([samples.store.rewards(each) for each in rows])
    model.reward_deviation.set(model.reward.in_space(rewards))


def outgrows_memory(store: EpisodeStore, reading: Reading | None = None) -> bool:
    """Whether a store is larger than the memory that this process may use, page cache included.

    Args:
        store (EpisodeStore): the episodes.
        reading (Reading, optional): memory reading. Defaults to ``None``, a new one.
    """
    reading = read_memory() if reading is None else reading
    most = [group.limit for group in reading.limits if group.limit is not None]
    if reading.machine is not None:
        most.append(reading.machine.total)
    files, _ = store_bytes(store.path)
    return bool(most) and files > min(most)
