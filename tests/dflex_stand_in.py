"""A small stand-in for ``dflex.envs``, for tests and for trying configurations where dflex is not installed.

No physics: states follow a fixed, stable, nearly linear map of states and actions. What it shares with dflex is the
interface, the dimensions and everything in which the interface surprises: finished rows are reset inside ``step``; the
``done`` tensor is one buffer, reused; observations own a graph; the reward is of the state before the transition;
``reset`` with ``force_reset`` resets every row; the constructor seeds the global generator; and only a state in which
nothing is finite any more is reported.
"""

from __future__ import annotations

import torch

__all__ = ["AntEnv", "AnymalEnv", "HopperEnv", "HumanoidEnv", "SNUHumanoidEnv", "StandInEnv"]


class StandInEnv:
    """Simulation with dflex's interface and no physics.

    Args:
        num_envs (int): number of rows, N.
        device (str): where it runs.
        render (bool): accepted, ignored.
        seed (int): seeds the *global* generator, as simulators do.
        episode_length (int): steps until truncation.
        no_grad (bool): accepted, ignored: observations own a graph wherever gradients are enabled.
        stochastic_init (bool): random initial states.
        MM_caching_frequency (int): accepted, ignored.
        early_termination (bool): terminate rows whose first coordinate falls below ``termination_height``.
        termination_height (float): see above.
    """

    num_obs = 0
    num_actions = 0

    def __init__(
        self,
        num_envs: int = 4,
        device: str = "cpu",
        render: bool = False,
        seed: int = 0,
        episode_length: int = 1000,
        no_grad: bool = True,
        stochastic_init: bool = True,
        MM_caching_frequency: int = 1,
        early_termination: bool = True,
        termination_height: float = -0.6,
    ) -> None:
        torch.manual_seed(seed)
        self.num_envs = num_envs
        self.device = device
        self.episode_length = episode_length
        self.stochastic_init = stochastic_init
        self.early_termination = early_termination
        self.termination_height = termination_height
        fixed = torch.Generator().manual_seed(self.num_obs)  # the same system whatever the seed
        mixing = torch.randn(self.num_obs, self.num_obs, generator=fixed) / self.num_obs**0.5
        drive = torch.randn(self.num_actions, self.num_obs, generator=fixed) / self.num_actions**0.5
        self.mixing = torch.nn.Parameter((0.9 * torch.eye(self.num_obs) + 0.08 * mixing).to(device))
        self.drive = torch.nn.Parameter((0.3 * drive).to(device))
        self.state = torch.zeros(num_envs, self.num_obs, device=device)
        self.progress_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.reset_buf = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.obs_buf = self._observe()

    def reset(self, env_ids: torch.Tensor | None = None, grads: bool = False, force_reset: bool = True) -> torch.Tensor:
        """Reset the rows ``env_ids``, or all of them; returns observations ``[N, O]`` of all rows."""
        if grads:
            self.state = self.state.detach()
        elif env_ids is None or force_reset:
            self._reset_rows(torch.arange(self.num_envs, device=self.device))
        else:
            self._reset_rows(env_ids)
        self.obs_buf = self._observe()
        return self.obs_buf

    def step(
        self, actions: torch.Tensor, play: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """One step with actions in [-1, 1]: observations after any reset, rewards, done, extras."""
        actions = actions.view(self.num_envs, self.num_actions).clip(-1.0, 1.0)
        reward = 1.0 + self.state[:, 0] - 0.1 * actions.square().mean(-1)
        self.state = torch.tanh(self.state @ self.mixing + actions @ self.drive)
        self.progress_buf += 1
        self.obs_buf = self._observe()
        if not torch.isfinite(self.obs_buf).any():
            raise RuntimeError("simulation is not finite")
        truncation = self.progress_buf > self.episode_length - 1
        termination = torch.zeros_like(truncation)
        if self.early_termination:
            termination = self.state[:, 0].detach() < self.termination_height
        self.reset_buf[:] = termination | truncation
        extras = {
            "obs_before_reset": self.obs_buf.clone(),
            "termination": termination,
            "truncation": truncation,
            "primal": reward.clone(),
        }
        rows = self.reset_buf.nonzero().squeeze(-1)
        if len(rows) > 0:
            self._reset_rows(rows)
            self.obs_buf = self._observe()
        return self.obs_buf, reward, self.reset_buf, extras

    def _reset_rows(self, rows: torch.Tensor) -> None:
        start = torch.zeros(len(rows), self.num_obs, device=self.device)
        if self.stochastic_init:
            start = 0.2 * (torch.rand(len(rows), self.num_obs, device=self.device) - 0.5)
        self.state = self.state.clone()
        self.state[rows] = start
        self.progress_buf[rows] = 0

    def _observe(self) -> torch.Tensor:
        # dflex's observations hang on its model's parameters; a detour of value zero gives these the same graph.
        return self.state + 0.0 * self.mixing.sum()


class HopperEnv(StandInEnv):
    """Hopper's dimensions."""

    num_obs, num_actions = 11, 3


class AntEnv(StandInEnv):
    """Ant's dimensions."""

    num_obs, num_actions = 37, 8


class AnymalEnv(StandInEnv):
    """Anymal's dimensions."""

    num_obs, num_actions = 49, 12


class HumanoidEnv(StandInEnv):
    """Humanoid's dimensions."""

    num_obs, num_actions = 76, 21


class SNUHumanoidEnv(StandInEnv):
    """SNU humanoid's dimensions: its actions are muscles."""

    num_obs, num_actions = 53, 152
