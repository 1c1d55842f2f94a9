"""One epoch's updates: world model, then policy, then critics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers.trainers import OptimizationStepper, Trainer

from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.modules import RewardScale
from pwm_torchrl.training.build import EnvFacts, Learner, Losses, Networks
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.recovery import MicroBatches, undo_of
from pwm_torchrl.training.replica import start_replicas
from pwm_torchrl.training.shared_updates import SharedUpdates
from pwm_torchrl.training.stop import StopRequest

POLICY_STARTS = ("replay", "current")


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


class PWMStepper(OptimizationStepper):
    """The updates of one epoch of PWM on a collected batch (https://arxiv.org/abs/2407.02466, algorithm 1).

    Args:
        cfg (Config): the run's configuration.
        networks (Networks): what is trained.
        losses (Losses): the objectives around ``networks``.
        learners (dict of Learner): optimizers by network name.
        replay (TrajectoryReplay): source of slices and start states.
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
        networks: Networks,
        losses: Losses,
        learners: dict[str, Learner],
        replay: TrajectoryReplay,
        reward_scale: RewardScale | None,
        first_model_updates: int,
        on_reduction: Callable[[str, int, int, str], None],
        ranks: Ranks | None = None,
        facts: EnvFacts | None = None,
    ) -> None:
        self.cfg = cfg
        self.networks = networks
        self.losses = losses
        self.learners = learners
        self.replay = replay
        self.reward_scale = reward_scale
        self.first_model_updates = first_model_updates
        self.micro_batches = MicroBatches.configured(cfg.memory, on_reduction)
        self.undo = undo_of(learners, losses.actor.return_statistics)
        self.shared: SharedUpdates | None = None
        if ranks is not None and facts is not None:
            start = partial(start_replicas, cfg, facts)
            self.shared = SharedUpdates(networks, losses, learners, self.undo, ranks, start)
        self.epoch = 0  # training epochs done
        self.updated = False  # whether the world model has had its first updates
        self.work: EpochWork | None = None  # of an epoch in progress
        self.made = 0  # updates of this process
        self.stop = StopRequest()

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
        if not self.sampling:
            return EpochWork(0, 0)
        return EpochWork(a.model_updates if self.updated else self.first_model_updates, a.policy_updates)

    def make_updates(self, work: EpochWork, sub_batch: TensorDictBase) -> None:
        """Do what is left, one update at a time."""
        while work.model_updates:
            self.stop.check()
            self.update_model(work.row)
            work.model_updates -= 1
            self.made += 1
        while work.policy_updates or work.states is not None:
            self.stop.check()
            if work.states is None:
                if work.starts is None:
                    work.starts = self.start_observations(sub_batch)
                # The rollout has no other name than its states: it would live on beside the next policy update.
                work.states = self.states_of(self.update_policy(work.starts, work.row))
                work.starts = None
                self.made += 1
                work.policy_updates -= 1
                work.passes = self.cfg.algorithm.critic_passes
            self.continue_critics(work)

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

    @torch.no_grad()
    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """Observations ``[imagination_batch, O]`` from which to imagine, replayed or of this epoch's batch."""
        count = self.cfg.algorithm.imagination_batch
        if self.cfg.algorithm.policy_starts == "replay":
            return self.replay.sample_observations(count)
        current = batch.get("observation").flatten(0, 1).to(self.replay.device)
        return current[torch.randperm(len(current), device=current.device)[:count]]

    def encode(self, observation: Tensor) -> TensorDictBase:
        """Start latents without gradient."""
        with torch.no_grad():
            latent = self.networks.world_model.encode(observation)
        return TensorDict(latent=latent, batch_size=latent.shape[:1])

    def update_policy(self, observation: Tensor, row: MetricRow) -> TensorDictBase:
        """One policy update; returns the detached rollout ``[B, H]``."""
        undo = self.undo["actor"]

        def attempt(size: int) -> tuple[TensorDictBase, TensorDictBase, Tensor]:
            start = self.encode(observation)
            if self.shared is not None:
                return self.shared.policy(start, size)
            losses, imagined = self.losses.actor.backward(start, size)
            return losses, imagined, self.learners["actor"].step(undo.before_step)

        losses, imagined, norm = self.micro_batches.run("policy", self.share(len(observation)), undo, attempt)
        named = {"loss/actor": losses["loss_actor"], "grad_norm/actor": norm}
        for key in ("imagined_return", "imagined_reward", "return_std", "terminated"):
            named[f"imagination/{key.removeprefix('imagined_')}"] = losses[key]
        row.mean(named)
        std = self.networks.actor.log_std.detach().clamp_min(self.networks.actor.log_std_min).exp()
        row.set({"policy/std": std.mean()})
        return imagined

    def states_of(self, imagined: TensorDictBase) -> TensorDictBase:
        """A rollout's states and targets ``[B * H]``, what critics learn on."""
        keys = self.losses.value.tensor_keys
        return imagined.select(keys.latent, keys.value_target, ("collector", "mask")).flatten()

    def update_critics(self, imagined: TensorDictBase, row: MetricRow) -> None:
        """Shuffled passes over a rollout's states in minibatches."""
        states = self.states_of(imagined)
        self.continue_critics(EpochWork(0, 0, states=states, passes=self.cfg.algorithm.critic_passes, row=row))

    def continue_critics(self, work: EpochWork) -> None:
        """What is left of the passes over a rollout's states."""
        states = work.states
        assert states is not None
        minibatch = math.ceil(len(states) / self.cfg.algorithm.critic_minibatches)
        while work.passes or work.minibatches:
            self.stop.check()
            if not work.minibatches:
                work.minibatches = list(torch.randperm(len(states), device=states.device).split(minibatch))
                work.passes -= 1
            self.update_critics_once(states, work.minibatches[0], work.row)
            self.made += 1
            del work.minibatches[0]
        work.states = None

    def update_critics_once(self, states: TensorDictBase, rows: Tensor, row: MetricRow) -> None:
        """One critic update on the states that ``rows`` names."""
        undo = self.undo["critics"]

        def attempt(size: int) -> tuple[dict[str, Tensor], Tensor]:
            if self.shared is not None:
                return self.shared.critic(states[rows], size)
            losses = self.losses.value.backward(states[rows], size)
            return losses, self.learners["critics"].step(undo.before_step)

        losses, norm = self.micro_batches.run("critic", self.share(len(rows)), undo, attempt)
        row.mean({"loss/value": losses["loss_value"], "grad_norm/value": norm})
        row.set({"critic/value": losses["value"]})

    def share(self, batch: int) -> int:
        """Rows of a batch of ``batch`` that one process has at most."""
        return batch if self.shared is None else self.shared.ranks.largest_share(batch)

    def gradient_profile(self, observation: Tensor) -> dict[str, float]:
        """Norm of the policy objective's gradient with respect to the action of every horizon step, batch mean."""
        start = self.encode(observation)["latent"]
        rollout, next_value = self.losses.actor.imagine(start)
        returns = self.losses.actor.returns(rollout, next_value)
        gradient = torch.autograd.grad(returns.mean(), rollout.actions)
        return {f"grad_profile/{t:02d}": g.norm(dim=-1).sum().item() for t, g in enumerate(gradient)}

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
        device = next(self.networks.actor.parameters()).device
        work = state_dict["work"]
        self.work = None if work is None else EpochWork.restored(work, device)
