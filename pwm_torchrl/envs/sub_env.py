"""One simulator behind the interface that all ours share: flat float32 observations, actions in [-1, 1].

Imports gymnasium; loaded by the makers only.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import gymnasium
import numpy as np

from pwm_torchrl.errors import ConfigurationError, EnvironmentFault

__all__ = ["SubEnv"]

RawStep = tuple[np.ndarray, float, bool, bool]


class SubEnv(gymnasium.Env, abc.ABC):
    """A simulator with action repeat, action scaling, a time limit in agent steps and a guard against faults.

    Args:
        name (str): label for messages.
        observation_dim (int): O, length of the flat observation.
        low (numpy.ndarray): smallest action of the simulator, ``[A]``.
        high (numpy.ndarray): largest action of the simulator, ``[A]``.
        action_repeat (int): environment steps per agent step; rewards are summed, and a repeat stops at done.
        episode_length (int, optional): agent steps after which to truncate, ``None`` to leave it to the simulator.
        index (int): position in the batch, for messages.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        name: str,
        observation_dim: int,
        low: np.ndarray,
        high: np.ndarray,
        action_repeat: int,
        episode_length: int | None,
        index: int,
    ) -> None:
        low, high = np.asarray(low, np.float64).ravel(), np.asarray(high, np.float64).ravel()
        check_action_box(name, low, high)
        self.name = self.identity = name  # messages use the name, which may become a label of the user's
        self.index = index
        self.action_repeat = action_repeat
        self.episode_length = episode_length
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self._middle, self._half_range = (high + low) / 2, (high - low) / 2
        self.last_seed: int | None = None
        self.pending_seed: int | None = None
        self.agent_steps = 0
        #: Whether the task is solved at this step; ``None`` where the simulator does not say.
        self.success: bool | None = None

    @abc.abstractmethod
    def _raw_reset(self, seed: int | None) -> np.ndarray:
        """Start an episode, reseeding first if ``seed`` is given; returns the flat observation."""

    @abc.abstractmethod
    def _raw_step(self, action: np.ndarray) -> RawStep:
        """One environment step with an action of the simulator's box: observation, reward, terminated, truncated."""

    @abc.abstractmethod
    def save_simulator(self) -> dict[str, Any]:
        """State of the simulator as tensors and plain values."""

    @abc.abstractmethod
    def load_simulator(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`save_simulator` gave."""

    @abc.abstractmethod
    def draw(self) -> np.ndarray:
        """Picture of the present state, uint8 ``[height, width, 3]``."""

    def raw_action_range(self) -> tuple[list[float], list[float]]:
        """Smallest and largest action of the simulator."""
        return (self._middle - self._half_range).tolist(), (self._middle + self._half_range).tolist()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; the first one after :meth:`seed_next_reset` uses that seed."""
        seed = self.pending_seed if seed is None else seed
        self.pending_seed = None
        if seed is not None:
            self.last_seed = seed
        self.agent_steps = 0
        try:
            observation = self._raw_reset(seed)
        except Exception as error:
            raise self._fault(f"reset raised {_describe(error)}") from error
        return self._checked(observation, 0.0), {}

    def seed_next_reset(self, seed: int) -> None:
        """Let the next reset start a new stream of random numbers."""
        self.pending_seed = seed
        self.last_seed = seed

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One agent step with an action in [-1, 1] (clipped to it)."""
        raw_action = self._middle + self._half_range * np.clip(action, -1.0, 1.0)
        total, terminated, truncated = 0.0, False, False
        try:
            for _ in range(self.action_repeat):
                observation, reward, terminated, truncated = self._raw_step(raw_action)
                total += reward
                if terminated or truncated:
                    break
        except Exception as error:
            raise self._fault(f"step {self.agent_steps} raised {_describe(error)}") from error
        self.agent_steps += 1
        if self.episode_length is not None and self.agent_steps >= self.episode_length:
            truncated = True
        return self._checked(observation, total), total, terminated, truncated, {}

    def save(self) -> dict[str, Any]:
        """Everything that decides how this sub-environment goes on."""
        return {
            "identity": self.identity,
            "agent_steps": self.agent_steps,
            "last_seed": self.last_seed,
            "pending_seed": self.pending_seed,
            "simulator": self.save_simulator(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`save` gave."""
        if state["identity"] != self.identity:
            raise ConfigurationError(
                f"the saved state is one of {state['identity']} and this environment is {self.identity} (env)"
            )
        self.agent_steps = state["agent_steps"]
        self.last_seed = state["last_seed"]
        self.load_simulator(state["simulator"])
        self.pending_seed = state["pending_seed"]

    def _checked(self, observation: np.ndarray, reward: float) -> np.ndarray:
        # A finite sum needs finite terms, and one reduction costs half of isfinite(...).all().
        if not np.isfinite(observation.sum() + reward):
            what = "observation" if not np.isfinite(observation).all() else "reward"
            if what == "observation" or not np.isfinite(reward):
                raise self._fault(f"{what} is not finite at step {self.agent_steps}")
        return observation

    def _fault(self, problem: str) -> EnvironmentFault:
        return EnvironmentFault(self.name, problem, seed=self.last_seed, index=self.index)


def check_action_box(name: str, low: np.ndarray, high: np.ndarray) -> None:
    """Raise ConfigurationError unless every action dimension has two finite, different ends."""
    bad = ~(np.isfinite(low) & np.isfinite(high) & (low < high))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ConfigurationError(
            f"{name} has an unbounded or empty action range [{low[i]}, {high[i]}] in dimension {i}: actions are scaled "
            "from [-1, 1], so every dimension needs finite bounds (choose another env, or bound its action space)"
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
