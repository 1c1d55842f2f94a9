"""TorchRL's Trainer with the published PWM's updates, which sample from a TorchRL replay buffer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import BaseCollector
from torchrl.data import Bounded, ReplayBuffer, SliceSampler
from torchrl.objectives.common import LossModule
from torchrl.record.loggers.common import Logger
from torchrl.trainers.trainers import LogScalar, OptimizationStepper, Trainer, TrainerHookBase, UpdateWeights

from pwm_torchrl.algorithm.build import Losses, Networks, build_losses, build_optimizers
from pwm_torchrl.algorithm.declarations import check_least
from pwm_torchrl.algorithm.pwm_paper import PaperPWM
from pwm_torchrl.algorithm.updates import LocalExecutor, Updates
from pwm_torchrl.config import AlgorithmConfig, Config
from pwm_torchrl.errors import ConfigurationError, nearest
from pwm_torchrl.modules import (
    Actor,
    CriticEnsemble,
    WorldModel,
    actor_module,
    policy_module,
    value_module,
    world_model_module,
)
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss
from pwm_torchrl.terminal import say

__all__ = ["PWMUpdates", "make_torchrl_trainer"]


class ReplaySlices:
    """A TorchRL replay buffer with the interface of :class:`~pwm_torchrl.data.TrajectoryReplay`.

    Args:
        buffer (ReplayBuffer): the buffer; its sampler must be a :class:`~torchrl.data.SliceSampler` with
            ``slice_len=horizon``.
        horizon (int): steps per slice.
        device (torch.device): device of the sampled tensors.
        key (str): configuration key that sets the steps, for errors. Defaults to ``"algorithm.horizon"``.

    Raises:
        ConfigurationError: for a sampler whose slices have other lengths.
    """

    def __init__(
        self, buffer: ReplayBuffer, horizon: int, device: torch.device, key: str = "algorithm.horizon"
    ) -> None:
        sampler = buffer.sampler
        if not isinstance(sampler, SliceSampler) or sampler.slice_len != horizon:
            found = f"slice_len={sampler.slice_len}" if isinstance(sampler, SliceSampler) else type(sampler).__name__
            raise ConfigurationError(
                f"replay_buffer.sampler: {found} does not give slices of {key}={horizon} steps; "
                f"choose sampler=pwm_slices with slice_len={horizon}."
            )
        if not (sampler.strict_length or sampler.pad_output):
            raise ConfigurationError(
                "replay_buffer.sampler.strict_length=False gives slices of several lengths; set pad_output=True too."
            )
        self.buffer, self.horizon, self.device = buffer, horizon, device

    @property
    def collected(self) -> int:
        """Number of steps that can be sampled."""
        return len(self.buffer)

    @property
    def can_sample(self) -> bool:
        """Whether anything was collected; the sampler itself raises if no trajectory is long enough."""
        return self.collected > 0

    def extend(self, batch: TensorDictBase) -> TensorDictBase:
        """Store a collector's batch ``[T]`` or ``[N, T]``; a one-dimensional storage gets one environment at a time.

        Raises:
            ConfigurationError: if the sampler could not distinguish these environments.
        """
        mask = batch.get(("collector", "mask"), None)
        data = batch if mask is None else batch[mask]
        if self.buffer.storage.ndim == 1:
            if data.ndim > 1 and data.shape[0] > 1 and self.buffer.sampler.traj_key is None:
                raise ConfigurationError(
                    f"replay_buffer.sampler.traj_key=None cannot tell {data.shape[0]} environments apart in a storage "
                    "of one dimension; set traj_key=[collector, traj_ids]."
                )
            data = data.reshape(-1)
        self.buffer.extend(data)
        return batch

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``."""
        return self.buffer.sample(count * self.horizon).reshape(count, self.horizon).to(self.device)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]``, one from a random step of each of ``count`` slices."""
        slices = self.sample_slices(count)
        mask = slices.get(("collector", "mask"), None)
        weights = torch.ones(slices.shape) if mask is None else mask.reshape(slices.shape).float().cpu()
        step = torch.multinomial(weights, 1).squeeze(1).to(self.device)
        return slices.get("observation")[torch.arange(count, device=self.device), step]


Loss = TypeVar("Loss", bound=LossModule)

#: Settings of the algorithm that have no effect in a TorchRL trainer, with the key that has this effect instead.
ELSEWHERE = {
    "collect_steps": "collector.frames_per_batch",
    "random_steps": "collector.init_random_frames",
    "exploration_noise": "the collector's policy",
    "normalize_observations": "world_model.normalize_observations",
    "normalize_rewards": "a reward transform of the environment",
    "log_std_init": "actor.log_std_init",
    "log_std_min": "actor.log_std_min",
}

#: ``algorithm.name`` of what a TorchRL trainer trains.
PAPER = "pwm_paper"


class PWMUpdates(OptimizationStepper):
    """The published PWM's updates after each batch of a TorchRL trainer; each batch is an epoch.

    Args:
        algorithm (PaperPWM): makes the updates.
        epochs (int): number of batches in the whole training, for the learning rates.

    Attributes:
        epoch (int): batches so far.
    """

    def __init__(self, algorithm: PaperPWM, epochs: int) -> None:
        self.algorithm, self.epochs = algorithm, epochs
        self.epoch = 0

    def step(self, trainer: Trainer | None, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one epoch's updates; returns detached scalars."""
        statistics = self.algorithm.networks.model.observation_statistics
        if statistics is not None:
            seen = sub_batch.get("observation")
            statistics.update(seen.reshape(-1, seen.shape[-1]).to(self.algorithm.samples.device))
        row = self.algorithm.epoch(sub_batch, self.epoch / max(1, self.epochs - 1))
        self.epoch += 1
        return TensorDict(row.numbers())

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's state and the number of batches."""
        return {"epoch": self.epoch, "algorithm": self.algorithm.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.epoch = int(state_dict["epoch"])
        self.algorithm.load_state_dict(state_dict["algorithm"])


def make_torchrl_trainer(
    collector: Callable[..., BaseCollector],
    total_frames: int,
    replay_buffer: ReplayBuffer,
    world_model: WorldModel,
    actor: Actor,
    critics: CriticEnsemble,
    *,
    model_loss: Callable[..., PWMModelLoss] | None = None,
    loss_module: Callable[..., PWMActorLoss] | None = None,
    value_loss: Callable[..., PWMValueLoss] | None = None,
    algorithm: AlgorithmConfig | Mapping[str, Any] | None = None,
    frame_skip: int = 1,
    logger: Logger | None = None,
    progress_bar: bool = True,
    seed: int | None = None,
    save_trainer_interval: int = 10000,
    log_interval: int = 10000,
    save_trainer_file: str | Path | None = None,
    checkpoint: Any = None,
    checkpoint_rotation: Any = None,
    checkpoint_metadata: Any = None,
    log_rewards: bool = True,
    hooks: Iterable[TrainerHookBase] | None = None,
) -> Trainer:
    """A TorchRL Trainer for the published PWM, whose parts share one world model, one actor and one critic ensemble.

    .. note:: It trains by :class:`~pwm_torchrl.algorithm.pwm_paper.PaperPWM`, which runs call ``algorithm=pwm_paper``.
        ``algorithm=pwm``, the default of runs, is another algorithm, which this trainer does not have: its results are
        not to be expected here, and the settings of :class:`~pwm_torchrl.config.AlgorithmConfig` that are only its own,
        such as ``updates_per_step``, are refused.

    This function combines the parts with the networks, because Hydra would create a network twice if two
    configurations refer to it. The collector and the losses are therefore passed as factories: as ``functools.partial``
    or with ``_partial_: true``.

    Args:
        collector (callable): makes the collector, given ``policy``.
        total_frames (int): environment steps of the whole training.
        replay_buffer (ReplayBuffer): a buffer with a :class:`~torchrl.data.SliceSampler` of
            ``slice_len=algorithm.horizon``, or ``algorithm.slice_steps`` if that is set. With several environments, a
            storage with ``ndim=2`` (and ``dim_extend=1``) keeps their trajectories whole; with one dimension, slices
            never span two batches of the collector.
        world_model (WorldModel): the model, single-task.
        actor (Actor): the policy on latents.
        critics (CriticEnsemble): the critics of latents.

    Keyword Args:
        model_loss (callable, optional): makes the model loss, given ``world_model``. Defaults to ``None``: the
            algorithm's.
        loss_module (callable, optional): makes the actor loss, given ``actor_network``, ``world_model`` and
            ``value_network``. Defaults to ``None``: the algorithm's.
        value_loss (callable, optional): makes the critic loss, given ``critics``. Defaults to ``None``: the
            algorithm's.
        algorithm (AlgorithmConfig or Mapping, optional): updates per batch, batch sizes and learning rates, and
            settings of the losses that are not given; its ``name`` is ``"pwm_paper"``. Defaults to ``None``: the
            settings of the published algorithm.
        frame_skip (int): environment steps per agent step. Defaults to ``1``.
        logger (Logger, optional): Defaults to ``None``.
        progress_bar (bool): Defaults to ``True``.
        seed (int, optional): Defaults to ``None``.
        save_trainer_interval (int): frames between checkpoints. Defaults to ``10000``.
        log_interval (int): frames between logs. Defaults to ``10000``.
        save_trainer_file (str or Path, optional): checkpoint file. Defaults to ``None``.
        checkpoint (Checkpoint, optional): Defaults to ``None``.
        checkpoint_rotation (CheckpointRotation, optional): Defaults to ``None``.
        checkpoint_metadata (callable, optional): Defaults to ``None``.
        log_rewards (bool): log the mean reward of each batch. Defaults to ``True``.
        hooks (iterable of TrainerHookBase, optional): registered last. Defaults to ``None``.

    Raises:
        ConfigurationError: for parts that do not fit together, or another algorithm.
    """
    cfg = Config(algorithm=_algorithm(algorithm))
    networks = Networks(model=world_model, actor=actor, critic=critics)
    _check_model(networks)
    device = next(world_model.parameters()).device
    replay = ReplaySlices(replay_buffer, cfg.algorithm.slice_length, device, cfg.algorithm.slice_key)
    policy = policy_module(world_model, actor, action_spec=Bounded(-1.0, 1.0, (actor.action_dim,), device=device))
    made = _unfinished("collector", collector, BaseCollector)(policy=policy)
    _check_actions(made)
    per_batch = made.requested_frames_per_batch * frame_skip
    cfg.training.epochs = max(1, math.ceil(total_frames / per_batch))

    losses = _losses(cfg, networks, model_loss, loss_module, value_loss)
    optimizers = build_optimizers(cfg, networks)
    pwm = PaperPWM(
        cfg.algorithm,
        networks,
        losses,
        optimizers,
        replay,
        Updates(LocalExecutor(losses, optimizers), cfg.memory, _say_reduction),
        first_model_updates=cfg.algorithm.first_model_updates,
    )
    updates = PWMUpdates(pwm, cfg.training.epochs)
    trainer = Trainer(
        collector=made,
        total_frames=total_frames,
        frame_skip=frame_skip,
        optim_steps_per_batch=1,
        loss_module=losses.actor,
        optimization_stepper=updates,
        logger=logger,
        progress_bar=progress_bar,
        seed=seed,
        save_trainer_interval=save_trainer_interval,
        log_interval=log_interval,
        save_trainer_file=save_trainer_file,
        checkpoint=checkpoint,
        checkpoint_rotation=checkpoint_rotation,
        checkpoint_metadata=checkpoint_metadata,
        auto_log_optim_steps=False,
    )
    # Not in `pre_epoch`, as TorchRL's off-policy trainers do: frames before the first update must be stored, too.
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("post_optim_complete_log", _metrics)
    for name, module in networks.items():
        trainer.register_module(name, module)
        trainer.register_module(f"{name}_optimizer", optimizers[name].optimizer)
    UpdateWeights(made, 1, policy_weights_getter=partial(TensorDict.from_module, policy)).register(trainer)
    if log_rewards:
        LogScalar(("next", "reward"), logname="r_training", log_pbar=True).register(trainer)
    for hook in hooks or ():
        hook.register(trainer)
    return trainer


def _algorithm(given: AlgorithmConfig | Mapping[str, Any] | None) -> AlgorithmConfig:
    if given is None:
        return AlgorithmConfig()
    values = dataclasses.asdict(given) if isinstance(given, AlgorithmConfig) else dict(given)
    known = dataclasses.asdict(AlgorithmConfig())
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known) or ", ".join(known)
            raise ConfigurationError(f"algorithm.{key} is not a setting of the algorithm; nearest: {near}.")
        if key == "name" and value != PAPER:
            raise ConfigurationError(
                f"algorithm.name={value} is not what a TorchRL trainer trains, which is {PAPER}; leave it out, or "
                "train a run instead."
            )
        if key in ELSEWHERE and value != known[key]:
            raise ConfigurationError(
                f"algorithm.{key}={value} has no effect in a TorchRL trainer: {ELSEWHERE[key]} has."
            )
        if key in PaperPWM.ignored and value != known[key]:
            raise ConfigurationError(
                f"algorithm.{key}={value} has no effect in a TorchRL trainer, which makes the updates of "
                f"algorithm={PAPER}; leave it at {known[key]}."
            )
    made = AlgorithmConfig(**values)
    check_least(made, PaperPWM.least)
    return made


def _check_model(networks: Networks) -> None:
    if networks.model.task is not None:
        count = networks.model.task.embedding.num_embeddings
        raise ConfigurationError(f"world_model.num_tasks={count} is not 0, but this trainer learns a single task.")


def _check_actions(collector: BaseCollector) -> None:
    """Check that the environment's actions are in [−1, 1], like the policy's, if this process can access it."""
    spec = getattr(getattr(collector, "env", None), "action_spec", None)
    if spec is None:
        return
    space = getattr(spec, "space", None)
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None or not bool((low == -1).all() and (high == 1).all()):
        found = type(spec).__name__ if low is None else f"in [{low.min().item():g}, {high.max().item():g}]"
        raise ConfigurationError(
            f"collector.create_env_fn makes an environment whose actions are {found}, but PWM acts in [-1, 1]; use "
            "env=pwm_gymnasium, env=pwm_dm_control or env=pwm_multitask, or add TorchRL's ActionScaling."
        )


def _unfinished(key: str, given: Any, finished: type) -> Callable[..., Any]:
    if isinstance(given, finished) or not callable(given):
        raise ConfigurationError(
            f"{key} is a finished {type(given).__name__}, which has networks of its own; set {key}._partial_=true."
        )
    return given


def _losses(cfg: Config, networks: Networks, model: Any, actor: Any, value: Any) -> Losses:
    """The algorithm's losses, or the given ones, on the shared networks."""
    losses = build_losses(cfg, networks)
    if model is not None:
        losses.model = _unfinished("model_loss", model, LossModule)(world_model=networks.model)
    if actor is not None:
        device = next(networks.actor.parameters()).device
        losses.actor = _unfinished("loss_module", actor, LossModule)(
            actor_network=actor_module(networks.actor),
            world_model=world_model_module(networks.model),
            value_network=value_module(networks.critic),
        ).to(device)
    if value is not None:
        losses.critic = _unfinished("value_loss", value, LossModule)(critics=networks.critic)
    for key, loss, kind in (
        ("model_loss", losses.model, PWMModelLoss),
        ("loss_module", losses.actor, PWMActorLoss),
        ("value_loss", losses.critic, PWMValueLoss),
    ):
        if not isinstance(loss, kind):
            raise ConfigurationError(f"{key} makes a {type(loss).__name__}, but trainer=pwm needs a {kind.__name__}.")
    return losses


def _metrics(optim_steps: int, losses: TensorDictBase) -> dict[str, Any]:
    """Metrics of an epoch's updates, for the logger."""
    return {key: value.item() for key, value in losses.items()}


def _say_reduction(update: str, refused: int, size: int, message: str) -> None:
    say(f"out of memory in a {update} update of {refused} rows; continuing with {size} at a time: {message}")
