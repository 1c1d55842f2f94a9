"""Short-horizon actor-critic (https://arxiv.org/abs/2204.07137): PWM's policy learning in a differentiable environment.

Where PWM imagines with a world model, the environment itself is stepped, and the gradient of the return goes back
through its equations of motion. So there is no model and no model update, nothing is collected beside it and nothing is
replayed: an epoch is

1. an actor update: all N environments go on for H steps from where they are; the gradient of
   J = Σ_{t<H} γ^t r_t + γ^H min_k V_k(o_H) goes back through rewards and transitions to the policy; after it
2. critic updates on the states of that rollout, on their TD(λ) targets,

as often as ``collect_steps`` holds H. Loss, critics and the state of an unfinished epoch are PWM's.
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
    on,
)
from pwm_torchrl.algorithm.pwm_paper import PaperPWM, PaperWork
from pwm_torchrl.config import AlgorithmConfig, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.objectives import PWMValueLoss

__all__ = ["SHAC"]


class SHAC(PaperPWM):
    """Actor and critic updates, in which the environment is stepped.

    ``samples`` are the :class:`~pwm_torchrl.envs.differentiable.Episodes` that its rollouts advance.
    """

    simulates = True
    ignored = (
        "random_steps", "normalize_observations", "normalize_rewards", "actor_starts", "actor_batch", "actor_updates",
        "model_updates", "first_model_updates",
    )  # fmt: skip

    # What others ask the class ----------------------------------------------------------------------------------------

    @classmethod
    def updates_of(cls, cfg: Config) -> list[Update]:
        """Actor and critic; a rollout has a row for each environment."""
        if cfg.mode != "online":
            raise ConfigurationError(
                f"algorithm=shac learns in an environment, and mode={cfg.mode} from stored episodes; choose another "
                "algorithm, or mode=online"
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
        """Actor and critics, both of observations."""
        actor = build_actor(cfg, facts.observation_dim, facts.action_dim)
        return Networks(actor=on(actor, device), critic=on(build_critic(cfg, facts.observation_dim), device))

    @classmethod
    def build_losses(cls, cfg: Config, facts: EnvFacts, networks: Networks) -> Losses:
        """PWM's losses with the simulator in place of the world model; their latents are the simulator's states."""
        if compiles(cfg):
            raise ConfigurationError(
                "algorithm.compile=true compiles the dynamics of a world model, and algorithm=shac has none; leave it "
                "at auto"
            )
        simulator = simulator_of(cfg, facts)
        step = TensorDictModule(
            Stepped(simulator), ["latent", "action"], [("next", key) for key in ("latent", "reward", "terminated")]
        )
        actor, critic = Observed(simulator, networks.actor), Observed(simulator, networks.critic)
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
        """Rollouts, each of which improves the policy and then fits the critics."""
        row = super().epoch(batch, progress)
        returns = self.samples.pop_returns()
        if len(returns):
            row.set({"train/return": returns.mean(), "train/episodes": len(returns)})
        return row

    def start_observations(self, batch: TensorDictBase) -> Tensor:
        """The states in which the environments are, ``[N, S]``."""
        states: Tensor = self.samples.states
        return states

    def sample_starts(self, count: int) -> Tensor:
        """Some of them."""
        states: Tensor = self.samples.states
        return states[:count]

    def encode(self, observation: Tensor) -> TensorDictBase:
        """States as the starts of rollouts."""
        return TensorDict(latent=observation, batch_size=observation.shape[:1])

    def critic_states(self, rollout: TensorDictBase) -> TensorDictBase:
        """Observations and TD(λ) targets of a rollout, ``[N * H]``; the environments go on behind it."""
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
        """Always: the environment is at hand."""
        return True

    def _new_work(self) -> PaperWork:
        return PaperWork(0, rollouts_per_epoch(self.cfg))


def rollouts_per_epoch(algorithm: AlgorithmConfig) -> int:
    """Actor updates of an epoch.

    Raises:
        ConfigurationError: if its steps are not whole rollouts.
    """
    if algorithm.horizon < 1:
        raise ConfigurationError(
            f"algorithm.horizon={algorithm.horizon} is too small for algorithm={algorithm.name}; it must be at least 1"
        )
    rollouts, rest = divmod(algorithm.steps_per_env, algorithm.horizon)
    if rest:
        raise ConfigurationError(
            f"algorithm.collect_steps={algorithm.collect_steps} is not a multiple of algorithm.horizon="
            f"{algorithm.horizon}, and algorithm=shac steps the environment in rollouts of that length"
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


class Observed(nn.Module):
    """A network of observations as one of a simulator's states."""

    def __init__(self, simulator: Any, network: nn.Module) -> None:
        super().__init__()
        self.simulator, self.network = simulator, network

    def forward(self, state: Tensor) -> Any:
        return self.network(self.simulator.observe(state))

    def value(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        """Smallest of the critics' values."""
        smallest: Tensor = self.network.value(self.simulator.observe(state), action)
        return smallest


class Stepped(nn.Module):
    """A simulator's step."""

    def __init__(self, simulator: Any) -> None:
        super().__init__()
        self.simulator = simulator

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        following: tuple[Tensor, Tensor, Tensor] = self.simulator.step(state, action)
        return following
