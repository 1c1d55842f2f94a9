"""Short-horizon actor-critic (https://arxiv.org/abs/2204.07137): PWM's policy learning in a differentiable environment.

PWM imagines with a world model; SHAC steps the environment itself, and the gradient of the return flows back through
its equations of motion. There is no world model, no model update, no separate collection and no replay. An epoch is

1. an actor update: all N environments continue for H steps from their current states; the gradient of
   J = Σ_{t<H} γ^t r_t + γ^H min_k V_k(o_H) flows back through rewards and transitions to the policy; then
2. critic updates on the states of that rollout, with TD(λ) targets,

repeated ``collect_steps`` / H times. Loss, critics and the state of an unfinished epoch are the published PWM's.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pwm_torchrl.algorithm.base import MetricRow, Update
from pwm_torchrl.algorithm.build import (
    EnvFacts,
    Losses,
    Networks,
    build_actor,
    build_actor_loss,
    build_critic,
    compiles,
    module_to_device,
)
from pwm_torchrl.algorithm.pwm_paper import PaperPWM, PaperWork
from pwm_torchrl.config import AlgorithmConfig, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.objectives import PWMValueLoss

__all__ = ["SHAC"]


class SHAC(PaperPWM):
    """Actor and critic updates; the actor's step the environment.

    ``samples`` are the :class:`~pwm_torchrl.envs.differentiable.RunningEpisodes` that the rollouts advance.
    """

    simulates = True
    ignored = (
        # those of the published PWM
        "updates_per_step", "max_updates", "critic_batch", "critic_steps", "target_rate", "temperature",
        "target_entropy", "temperature_lr",
        # of the model and its data
        "slice_steps", "model_batch", "model_lr", "model_betas", "model_grad_norm", "model_updates",
        "first_model_updates", "scale_rewards", "normalize_observations",
        # of collection, and of rollouts that start anywhere
        "random_steps", "exploration_noise", "normalize_rewards", "actor_starts", "actor_batch", "actor_updates",
    )  # fmt: skip

    # Class methods that describe the algorithm ------------------------------------------------------------------------

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """Actor and critic; an actor batch has one row per environment."""
        if cfg.mode != "online":
            raise ConfigurationError(
                f"algorithm=shac learns in an environment, but mode={cfg.mode} learns from stored episodes; choose "
                "another algorithm, or mode=online"
            )
        a, envs = cfg.algorithm, int(cfg.env.get("num_envs") or 1)
        rollouts = rollouts_per_epoch(a)
        states = -(-envs * a.horizon // a.critic_minibatches)
        return [
            Update("actor", "rollouts", envs, rollouts, a.horizon),
            Update("critic", "states", states, rollouts * a.critic_passes * a.critic_minibatches),
        ]

    @classmethod
    def build_networks(cls, cfg: Config, facts: EnvFacts, device: torch.device | str = "cpu") -> Networks:
        """Actor and critics, both on observations."""
        actor = build_actor(cfg, facts.observation_dim, facts.action_dim)
        return Networks(
            actor=module_to_device(actor, device),
            critic=module_to_device(build_critic(cfg, facts.observation_dim), device),
        )

    @classmethod
    def build_losses(cls, cfg: Config, facts: EnvFacts, networks: Networks) -> Losses:
        """PWM's losses with the simulator as world model; their latents are the simulator's states."""
        if compiles(cfg):
            raise ConfigurationError(
                "algorithm.compile=true compiles the dynamics of a world model, but algorithm=shac has none; leave it "
                "at auto"
            )
        simulator = simulator_of(cfg, facts)
        step = TensorDictModule(
            SimulatorStep(simulator),
            ["latent", "action"],
            [("next", key) for key in ("latent", "reward", "terminated")],
        )
        actor, critic = ObservingNetwork(simulator, networks.actor), ObservingNetwork(simulator, networks.critic)
        return Losses(
            actor=build_actor_loss(cfg, actor, step, critic),
            critic=PWMValueLoss(networks.critic, precision=cfg.training.precision),
        )

    @classmethod
    def starts_like(cls, cfg: Config, facts: EnvFacts, networks: Networks, count: int) -> Tensor:
        """States ``[count, S]``."""
        return torch.zeros(count, simulator_of(cfg, facts).state_dim)

    @classmethod
    def critic_input(cls, cfg: Config, facts: EnvFacts, latent: Tensor) -> Tensor:
        """Observations of states."""
        return simulator_of(cfg, facts).observe(latent)

    # An epoch ---------------------------------------------------------------------------------------------------------

    def epoch(self, batch: TensorDictBase, progress: float) -> MetricRow:
        """Repeat: an actor update on one rollout, then critic updates on its states."""
        row = super().epoch(batch, progress)
        returns = self.samples.pop_returns()
        if len(returns):
            row.set({"train/return": returns.mean(), "train/episodes": len(returns)})
        return row

    @property
    def actor_updates(self) -> int:
        """Rollouts of an epoch."""
        return rollouts_per_epoch(self.cfg)

    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """The environments' current states, ``[N, S]``."""
        states: Tensor = self.samples.states
        return states

    def sample_starts(self, count: int) -> Tensor:
        """The states of the first ``count`` environments."""
        states: Tensor = self.samples.states
        return states[:count]

    def encode(self, observation: Tensor) -> TensorDictBase:
        """States as start latents; there is no encoder."""
        return TensorDict(latent=observation, batch_size=observation.shape[:1])

    def critic_states(self, rollout: TensorDictBase) -> TensorDictBase:
        """Observations and TD(λ) targets of a rollout, ``[N * H]``; moves the environments to the rollout's end."""
        keys = self.losses.actor.tensor_keys
        last = rollout[:, -1]
        self.samples.advance(
            last[keys.latent],
            last[keys.action],
            rollout["next", keys.reward].squeeze(-1),
            rollout["next", keys.terminated].squeeze(-1),
        )
        states = super().critic_states(rollout)
        key = self.losses.critic.tensor_keys.latent
        return states.set(key, self.samples.simulator.observe(states[key]))

    @property
    def has_data(self) -> bool:
        """Always true: rollouts need no collected data."""
        return True

    def _new_work(self) -> PaperWork:
        return PaperWork(0, self.actor_updates)


def rollouts_per_epoch(algorithm: AlgorithmConfig) -> int:
    """Actor updates per epoch.

    Raises:
        ConfigurationError: if the horizon does not divide the epoch's steps.
    """
    rollouts, rest = divmod(algorithm.steps_per_env, algorithm.horizon)
    if rest:
        raise ConfigurationError(
            f"algorithm.collect_steps={algorithm.collect_steps} is not a multiple of algorithm.horizon="
            f"{algorithm.horizon}, but algorithm=shac steps the environment in rollouts of that length"
        )
    return rollouts


def simulator_of(cfg: Config, facts: EnvFacts) -> Any:
    """The environment's :class:`~pwm_torchrl.envs.differentiable.Simulator`.

    Raises:
        ConfigurationError: if it has none.
    """
    simulator = getattr(facts, "simulator", None)
    if simulator is None:
        raise ConfigurationError(
            f"env.name={cfg.env.get('name') or cfg.env.get('_target_')} is not differentiable, which algorithm=shac "
            "needs; choose env=pendulum_torchrl, a maker that returns a pwm_torchrl.envs.DifferentiableEnv, or "
            "algorithm=pwm"
        )
    return simulator


class ObservingNetwork(nn.Module):
    """Wraps a network on observations so that it takes a simulator's states."""

    def __init__(self, simulator: Any, network: nn.Module) -> None:
        super().__init__()
        self.simulator, self.network = simulator, network

    def forward(self, state: Tensor) -> Any:
        return self.network(self.simulator.observe(state))

    def value(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Minimum over the critics."""
        smallest: Tensor = self.network.value(self.simulator.observe(state), action)
        return smallest


class SimulatorStep(nn.Module):
    """A simulator's ``step`` as a module."""

    def __init__(self, simulator: Any) -> None:
        super().__init__()
        self.simulator = simulator

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following: tuple[Tensor, Tensor, Tensor] = self.simulator.step(state, action)
        return following
