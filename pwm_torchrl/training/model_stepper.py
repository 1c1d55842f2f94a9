"""One epoch's updates of a world model; those of a policy come on top of it (:mod:`.stepper`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers.trainers import OptimizationStepper, Trainer

from pwm_torchrl.modules import RewardScale
from pwm_torchrl.terminal import Progress
from pwm_torchrl.training.build import EnvFacts, Learner, ModelLosses, ModelNetworks
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.recovery import MicroBatches, undo_of
from pwm_torchrl.training.replica import start_replicas
from pwm_torchrl.training.shared_updates import SharedUpdates
from pwm_torchrl.training.stop import StopRequest


class Samples(Protocol):
    """What updates draw from: a replay, or stored episodes."""

    @property
    def device(self) -> torch.device: ...
    @property
    def collected(self) -> int: ...
    @property
    def can_sample(self) -> bool: ...
    def sample_slices(self, count: int) -> TensorDictBase: ...
    def sample_observations(self, count: int) -> Tensor: ...


@dataclass
class EpochWork:
    """What is left to do of an epoch's updates, and their metrics so far.

    Attributes:
        model_updates (int): world-model updates left.
        policy_updates (int): policy updates left.
        starts (Tensor, optional): observations ``[B, O]`` from which the present policy update imagines.
        states (TensorDict, optional): imagined states ``[B * H]`` on which critics are learning.
        passes (int): passes over ``states`` that are not begun.
        minibatches (list of Tensor): rows of ``states`` left in the present pass.
        row (MetricRow): metrics.
    """

    model_updates: int
    policy_updates: int
    starts: Tensor | None = None
    states: TensorDictBase | None = None
    passes: int = 0
    minibatches: list[Tensor] = field(default_factory=list)
    row: MetricRow = field(default_factory=MetricRow)

    def state_dict(self) -> dict[str, Any]:
        states = None if self.states is None else dict(self.states.flatten_keys("|").items())
        return {**vars(self), "states": states, "row": self.row.state_dict()}

    @classmethod
    def restored(cls, state_dict: dict[str, Any], device: torch.device) -> EpochWork:
        """Work as :meth:`state_dict` gave it, its tensors on ``device``."""
        values = dict(state_dict)
        if values["states"] is not None:
            values["states"] = TensorDict(values["states"]).auto_batch_size_(1).unflatten_keys("|").to(device)
        if values["starts"] is not None:
            values["starts"] = values["starts"].to(device)
        values["minibatches"] = [rows.to(device) for rows in values["minibatches"]]
        return cls(**{**values, "row": MetricRow.restored(values["row"], device)})


class ModelStepper(OptimizationStepper):
    """The updates of one epoch of a world model alone, as in pre-training.

    Args:
        cfg (Config): the run's configuration.
        networks (ModelNetworks): what is trained.
        losses (ModelLosses): the objectives around ``networks``.
        learners (dict of Learner): optimizers by network name.
        replay (Samples): source of slices and start states.
        reward_scale (RewardScale, optional): divides rewards before the model sees them.
        first_model_updates (int): world-model updates of the first training epoch.
        on_reduction (callable): told of every micro-batch that was halved because memory ran out; see
            :class:`~pwm_torchrl.training.recovery.MicroBatches`.
        ranks (Ranks, optional): processes among which every update's batch is shared out. Defaults to ``None``: this
            one has all of it.
        facts (EnvFacts, optional): the environment's dimensions, which the other ranks are told; needed with ``ranks``.
            Defaults to ``None``.
    """

    def __init__(
        self,
        cfg: Config,
        networks: ModelNetworks,
        losses: ModelLosses,
        learners: dict[str, Learner],
        replay: Samples,
        reward_scale: RewardScale | None,
        first_model_updates: int,
        on_reduction: Callable[[str, int, int, str], None],
        ranks: Ranks | None = None,
        facts: EnvFacts | None = None,
    ) -> None:
        self.cfg = cfg
        self.networks, self.losses = networks, losses
        self.learners = learners
        self.replay = replay
        self.reward_scale = reward_scale
        self.first_model_updates = first_model_updates
        self.micro_batches = MicroBatches.configured(cfg.memory, on_reduction)
        self.undo = undo_of(learners, losses.return_statistics)
        self.shared: SharedUpdates | None = None
        if ranks is not None and facts is not None:
            start = partial(start_replicas, cfg, facts)
            self.shared = SharedUpdates(networks, losses, learners, self.undo, ranks, start)
        self.epoch = 0  # training epochs done
        self.updated = False  # whether the world model has had its first updates
        self.work: EpochWork | None = None  # of an epoch in progress
        self.made = 0  # updates of this process
        self.stop = StopRequest()
        self.progress = Progress()

    def step(self, trainer: Trainer | None, sub_batch: TensorDictBase) -> TensorDictBase:
        """Run one epoch's updates after collecting ``sub_batch`` ``[N, T]``; returns detached scalars.

        Called again after a stop, it goes on where it stopped.

        Raises:
            StopInEpoch: between two updates, if a stop was asked for.
        """
        if trainer is not None:
            # TorchRL's Trainer skips the updates while actions are random; the schedule counts those epochs too.
            self.epoch = trainer.epoch
        if self.work is None:
            self.work = self.begin()
        for name, learner in self.learners.items():
            learner.set_progress(self.epoch / max(1, self.cfg.training.epochs - 1))
            self.work.row.set({f"lr/{name}": learner.optimizer.param_groups[0]["lr"]})
        self.make_updates(self.work, sub_batch)
        self.epoch += 1
        if self.sampling:
            self.updated = True
            self.work.row.set(self.micro_batches.metrics())
        numbers = self.work.row.numbers()
        self.work = None
        return TensorDict(numbers)

    @property
    def sampling(self) -> bool:
        """Whether there is enough in replay for updates."""
        return self.replay.collected >= self.cfg.algorithm.random_steps and self.replay.can_sample

    def begin(self) -> EpochWork:
        """The work of a whole epoch."""
        a = self.cfg.algorithm
        return EpochWork(a.model_updates if self.updated else self.first_model_updates, 0)

    def make_updates(self, work: EpochWork, sub_batch: TensorDictBase) -> None:
        """Do what is left, one update at a time."""
        with self.progress.phase("fitting the model", work.model_updates) as count:
            while work.model_updates:
                self.stop.check()
                self.update_model(work.row)
                work.model_updates -= 1
                self.made += 1
                count()

    def update_model(self, row: MetricRow) -> None:
        """One world-model update on replayed slices."""
        batch = self.cfg.algorithm.model_batch
        undo = self.undo["world_model"]

        def attempt(size: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            data = self.sample_slices(batch)
            if self.shared is not None:
                return self.shared.model(data, size)
            slices = self.losses.model.read(data)
            losses = self.losses.model.backward(slices, size)
            return losses, slices.valid.float().mean(), self.learners["world_model"].step(undo.before_step)

        losses, valid, norm = self.micro_batches.run("world-model", self.share(batch), undo, attempt)
        row.mean({"loss/model": torch.stack(list(losses.values())).sum()})
        row.mean({key.replace("loss_", "loss/model_"): value for key, value in losses.items()})
        row.mean({"grad_norm/model": norm, "data/valid_fraction": valid})

    def sample_slices(self, count: int) -> TensorDictBase:
        """Replayed slices ``[count, H]``, rewards scaled."""
        batch = self.replay.sample_slices(count)
        if self.reward_scale is not None:
            batch["next", "reward"] = self.reward_scale(batch["next", "reward"])
        return batch

    def share(self, batch: int) -> int:
        """Rows of a batch of ``batch`` that one process has at most."""
        return batch if self.shared is None else self.shared.ranks.largest_share(batch)

    def state_dict(self) -> dict[str, Any]:
        """Counters, reduced micro-batches and unfinished work; networks and optimizers are components of their own."""
        return {
            "epoch": self.epoch,
            "updated": self.updated,
            "micro_batches": self.micro_batches.state_dict(),
            "work": None if self.work is None else self.work.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = int(state_dict["epoch"])
        self.updated = bool(state_dict["updated"])
        self.micro_batches.load_state_dict(state_dict["micro_batches"])
        device = next(self.networks.world_model.parameters()).device
        work = state_dict["work"]
        self.work = None if work is None else EpochWork.restored(work, device)
