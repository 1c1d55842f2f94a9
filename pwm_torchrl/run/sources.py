"""Data sources of a run: environments to collect in, stored episodes, or a differentiable environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from pwm_torchrl.algorithm.base import MetricRow, find_algorithm
from pwm_torchrl.algorithm.build import Networks
from pwm_torchrl.algorithm.shac import simulator_of
from pwm_torchrl.config import Config
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.data.episodes import EpisodeStore
from pwm_torchrl.devices import environment_device, pick_device
from pwm_torchrl.envs import EnvInfo, env_info, make_env
from pwm_torchrl.envs.differentiable import RunningEpisodes
from pwm_torchrl.envs.workers import OpenEnv
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.storage import steps_since_checkpoint
from pwm_torchrl.modules import PinkNoise, RewardScale, exploring_policy_module
from pwm_torchrl.run.collector import EpisodeReturns, ResumableCollector, training_env_seed
from pwm_torchrl.run.stored_episodes import (
    StoredSamples,
    check_horizon,
    extraction_facts,
    follow_world_model,
    open_store,
    pin_world_model,
    pretraining_facts,
    pretraining_tasks,
    take_observation_statistics,
    take_reward_unit,
    training_split,
)
from pwm_torchrl.terminal import Progress

#: Model updates in the first epoch that has any, if the episode length is unknown.
UNKNOWN_EPISODE_UPDATES = 1000


class Source(Protocol):
    """A run's data source.

    The constructor opens it, because the memory plan needs its dimensions; :meth:`start` is called after planning.

    Attributes:
        info (EnvInfo): dimensions and lengths.
        samples (Samples or RunningEpisodes): data that updates sample from, or episodes that they step.
        reward_scale (RewardScale, optional): scales the rewards that the model is trained on.
        first_model_updates (int): model updates in the first epoch that has any.
        agent_steps_per_epoch (int): policy decisions in an epoch, summed over environments; 0 without an environment.
        agent_steps (int): policy decisions so far.
        resumed_exactly (bool): whether a restored source continues as if it had never stopped.
        components (dict): the objects whose state is saved in checkpoints, by name.
    """

    agent_steps: int

    @property
    def info(self) -> EnvInfo: ...
    @property
    def samples(self) -> Any: ...
    @property
    def reward_scale(self) -> RewardScale | None: ...
    @property
    def first_model_updates(self) -> int: ...
    @property
    def agent_steps_per_epoch(self) -> int: ...
    @property
    def resumed_exactly(self) -> bool: ...
    @property
    def components(self) -> dict[str, Any]: ...

    def start(
        self,
        cfg: Config,
        run_dir: Path,
        networks: Networks,
        policy: TensorDictModuleBase | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Prepare for :meth:`collect`."""

    def collect(self, row: MetricRow) -> TensorDictBase:
        """The data of an epoch, ``[N, T]``."""

    def store(self, batch: TensorDictBase) -> None:
        """Add collected data to ``samples``; may write files."""

    def restored(self) -> None:
        """Called after a checkpoint was loaded into ``components``."""

    def environment_failed(self) -> None:
        """Called after an environment raised an exception in the middle of a batch, so that its state is invalid."""

    def close(self) -> None:
        """Close everything that this object opened."""


class OnlineSource:
    """Collects data in environments into a replay buffer.

    Args:
        cfg (Config): the run's configuration.

    Raises:
        ConfigurationError: if the environments cannot be created, or settings do not fit them.
    """

    def __init__(self, cfg: Config) -> None:
        self.env_device = environment_device(cfg)
        seed = training_env_seed(cfg.seed)
        with OpenEnv.opening(str(cfg.env.get("name") or cfg.env.get("_target_")), seed) as self.opened:
            self.env = self.opened.hold(
                make_env(cfg.env, num_envs=int(cfg.env.get("num_envs", 1)), seed=seed, device=self.env_device)
            )
        self.info = env_info(self.env)
        check_horizon(cfg, self.info)
        first = cfg.algorithm.first_model_updates
        self.first_model_updates = first if first is not None else self.info.episode_length or UNKNOWN_EPISODE_UPDATES
        self.agent_steps_per_epoch = cfg.algorithm.steps_per_env * self.info.num_envs
        self.agent_steps = 0

    def start(
        self,
        cfg: Config,
        run_dir: Path,
        networks: Networks,
        policy: TensorDictModuleBase | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Create the collector, the replay buffer and the running statistics."""
        assert policy is not None
        a, t = cfg.algorithm, cfg.training
        steps = a.steps_per_env
        noise = None
        if a.exploration_noise == "pink":
            assert networks.actor is not None
            noise = PinkNoise(self.info.num_envs, self.info.action_dim).to(device)
            policy = exploring_policy_module(networks.model, networks.actor, noise)
        self.collector = ResumableCollector(self.env, policy, steps, a.random_steps, device, self.env_device)
        self.collector.progress = progress
        self.samples = TrajectoryReplay(
            t.replay_capacity,
            self.info.num_envs,
            a.slice_length,
            t.replay_storage,
            run_dir / "replay",
            device,
            observation_dim=self.info.observation_dim,
            action_dim=self.info.action_dim,
            since_checkpoint_steps=steps_since_checkpoint(t.epochs, steps, t.checkpoint_every, t.keep_checkpoints),
        )
        self.reward_scale = RewardScale(self.info.num_envs, a.gamma).to(device) if a.normalize_rewards else None
        self.observation_statistics = networks.model.observation_statistics
        self.reward_deviation = networks.model.reward_deviation
        self.returns = EpisodeReturns(self.info.num_envs)
        self.components: dict[str, Any] = {
            "replay": self.samples,
            "collector": self.collector,
            "episode_returns": self.returns,
            **({} if noise is None else {"exploration_noise": noise}),
            **({} if self.reward_scale is None else {"reward_scale": self.reward_scale}),
        }
        self._batches: Iterator[TensorDictBase] | None = None

    @property
    def resumed_exactly(self) -> bool:
        """Whether the environments' states were restored."""
        return self.collector.resumed_exactly

    def collect(self, row: MetricRow) -> TensorDictBase:
        """Collect the next steps of every environment, and update the running statistics with them."""
        if self._batches is None:
            self._batches = iter(self.collector)
        with self.opened.naming_dead_workers():
            batch = next(self._batches)
        finished = self.returns.update(batch)
        if len(finished):
            row.set({"train/return": finished.mean(), "train/episodes": len(finished)})
        if self.reward_scale is not None:
            step = batch["next"].to(next(self.reward_scale.buffers()).device)
            self.reward_scale.update(step["reward"], step["done"])
        if self.reward_deviation is not None:
            reward = batch["next", "reward"].to(self.reward_deviation.largest.device)
            self.reward_deviation.update(reward if self.reward_scale is None else self.reward_scale(reward))
        if self.observation_statistics is not None:
            self.observation_statistics.update(batch["observation"].to(self.observation_statistics.mean.device))
        self.agent_steps += batch.numel()
        return batch

    def store(self, batch: TensorDictBase) -> None:
        """Add the batch to the replay buffer."""
        self.samples.extend(batch)

    def restored(self) -> None:
        """Begin new episodes if the environments' states could not be restored."""
        if not self.resumed_exactly:
            self.begin_new_episodes()

    def begin_new_episodes(self) -> None:
        """End the episodes in the replay buffer, because the next steps do not continue them."""
        self.samples.end_episodes()
        self.returns.running.zero_()
        if self.reward_scale is not None:
            self.reward_scale.returns.zero_()

    def environment_failed(self) -> None:
        """Leave the environments' states out of checkpoints."""
        self.collector.forget_env_state()

    def close(self) -> None:
        """Close the environments and end their worker processes."""
        self.opened.close()


class StoreIdentity:
    """Checks that a resumed run has the stored episodes that it began with, even if their path has changed.

    Args:
        store (EpisodeStore): the episodes.
    """

    def __init__(self, store: EpisodeStore) -> None:
        self.store = store

    def state_dict(self) -> dict[str, str]:
        """The fingerprint of the episodes."""
        return {"fingerprint": self.store.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Compare the fingerprints.

        Raises:
            ConfigurationError: if the store has other episodes.
        """
        if state_dict["fingerprint"] != self.store.fingerprint():
            raise ConfigurationError(
                f"data.path={self.store.path} does not hold the episodes that the run began with; set data.path to "
                "the store that has them"
            )


class StoredSource:
    """Stored episodes; nothing is collected.

    Args:
        cfg (Config): the run's configuration; if the run was planned before its world model existed, the world model's
            hash is set here.
        run_dir (Path): the run's directory.

    Raises:
        ConfigurationError: if store, world model and task registry do not agree.
    """

    reward_scale: RewardScale | None = None
    agent_steps_per_epoch = agent_steps = 0
    resumed_exactly = True

    def __init__(self, cfg: Config, run_dir: Path) -> None:
        if cfg.mode == "extract":
            pin_world_model(cfg, run_dir)
            follow_world_model(cfg, run_dir)
            self.info = extraction_facts(cfg)
            self.episodes = open_store(cfg, staged=True)
            self.tasks = [str(cfg.task)]
        else:
            self.episodes = open_store(cfg, staged=True)
            self.tasks = list(pretraining_tasks(cfg, self.episodes).names)
            self.info = pretraining_facts(cfg, self.episodes)
        self.first_model_updates = cfg.algorithm.model_updates
        self.components: dict[str, Any] = {"data": StoreIdentity(self.episodes)}

    def start(
        self,
        cfg: Config,
        run_dir: Path,
        networks: Networks,
        policy: TensorDictModuleBase | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Prepare sampling from the training episodes and, in pre-training, from the held-out ones."""
        options: dict[str, Any] = {"device": device}
        if cfg.mode == "extract":
            self.samples = self._samples(cfg, labelled=False, **options)
            if cfg.algorithm.scale_rewards:
                take_reward_unit(networks.model, self.samples)
            return
        training, held_out = training_split(cfg, self.episodes)
        options["balanced"] = cfg.data.balanced
        self.samples = self._samples(cfg, episodes=training, **options)
        take_observation_statistics(networks.model, self.samples)
        take_reward_unit(networks.model, self.samples)
        self.held_out = self._samples(cfg, episodes=held_out, **options)

    def _samples(self, cfg: Config, **options: Any) -> StoredSamples:
        widths = self.info.observation_dim, self.info.action_dim
        return StoredSamples(self.episodes, self.tasks, cfg.algorithm.slice_length, *widths, **options)

    def collect(self, row: MetricRow) -> TensorDictBase:
        """An empty batch."""
        return TensorDict({}, batch_size=[1])

    def store(self, batch: TensorDictBase) -> None:
        """Nothing to do: the episodes are stored."""

    def restored(self) -> None:
        """Nothing to do: stored episodes do not change."""

    def environment_failed(self) -> None:
        """Nothing to do: nothing is collected."""

    def close(self) -> None:
        """Nothing to do: the files are memory-mapped."""


class SimulatedSource:
    """A differentiable environment, which is stepped by the algorithm's updates.

    Args:
        cfg (Config): the run's configuration.

    Raises:
        ConfigurationError: if the environment cannot be created, or is not differentiable.
    """

    reward_scale: RewardScale | None = None
    first_model_updates = 0
    resumed_exactly = True

    def __init__(self, cfg: Config) -> None:
        seed = training_env_seed(cfg.seed)
        with OpenEnv.opening(str(cfg.env.get("name") or cfg.env.get("_target_")), seed) as self.opened:
            env = self.opened.hold(
                make_env(cfg.env, num_envs=int(cfg.env["num_envs"]), seed=seed, device=pick_device(cfg.device))
            )
        self.info = env_info(env)
        simulator_of(cfg, self.info)
        check_horizon(cfg, self.info)
        self.agent_steps_per_epoch = cfg.algorithm.steps_per_env * self.info.num_envs
        self.agent_steps = 0

    def start(
        self,
        cfg: Config,
        run_dir: Path,
        networks: Networks,
        policy: TensorDictModuleBase | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Start the episodes."""
        self.samples = RunningEpisodes(self.info.simulator, self.info, device)
        self.components: dict[str, Any] = {"episodes": self.samples}

    def collect(self, row: MetricRow) -> TensorDictBase:
        """An empty batch: the epoch's updates make the steps."""
        self.agent_steps += self.agent_steps_per_epoch
        return TensorDict({}, batch_size=[1])

    def store(self, batch: TensorDictBase) -> None:
        """Nothing to do: there is no replay buffer."""

    def restored(self) -> None:
        """Nothing to do: the checkpoint has the episodes' whole state."""

    def environment_failed(self) -> None:
        """Nothing to do: a failed step does not change the episodes' state."""

    def close(self) -> None:
        """Close the environment."""
        self.opened.close()


def open_source(cfg: Config, run_dir: Path) -> OnlineSource | StoredSource | SimulatedSource:
    """Open the data source for a run's mode and algorithm."""
    if cfg.mode != "online":
        return StoredSource(cfg, run_dir)
    return SimulatedSource(cfg) if find_algorithm(cfg.algorithm.name).simulates else OnlineSource(cfg)
