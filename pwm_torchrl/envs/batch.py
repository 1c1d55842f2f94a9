"""Batches of environments that step in this process and can save their state."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical
from torchrl.envs.libs.gym import GymWrapper

from pwm_torchrl.envs.rendering import draw_or_explain
from pwm_torchrl.envs.standard import EnvInfo
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault

__all__ = ["BatchedEnv", "SubEnv", "batch_sub_envs", "chosen"]

T = TypeVar("T")


class _VectorEnv(SyncVectorEnv):
    """gymnasium's serial vector environment, without auto-reset, that can save and load its state."""

    envs: list[SubEnv]

    def __init__(self, sub_envs: Sequence[SubEnv]) -> None:
        super().__init__([lambda env=env: env for env in sub_envs], autoreset_mode=AutoresetMode.DISABLED)

    def save(self) -> dict[str, Any]:
        """State of every sub-environment, and the rows that a partial reset returns unchanged."""
        return {
            "sub_envs": [env.save() for env in self.envs],
            "observations": [None if row is None else torch.tensor(row) for row in self._env_obs],
            "terminated": torch.tensor(self._terminations),
            "truncated": torch.tensor(self._truncations),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save`."""
        for env, saved in zip(self.envs, state["sub_envs"], strict=True):
            env.load(saved)
        rows = state["observations"]
        self._env_obs = [None if row is None else row.numpy().copy() for row in rows]
        self._terminations = state["terminated"].numpy().copy()
        self._truncations = state["truncated"].numpy().copy()
        self._autoreset_envs = self._terminations | self._truncations


class BatchedEnv(GymWrapper):
    """TorchRL environment of batch size ``[N]`` over N sub-environments stepped one after the other.

    One wrapper around a batch is several times faster than a batch of wrappers, since TorchRL's cost per step occurs
    once for N environments.

    Args:
        vector (_VectorEnv): the sub-environments.
        info (EnvInfo): facts for :func:`~pwm_torchrl.envs.env_info`.
        device (torch.device): device of the tensors.
        state_support (str): text that says what :func:`~pwm_torchrl.envs.save_env_state` can save.
        can_save (bool): whether it can save the state.
    """

    def __init__(
        self,
        vector: _VectorEnv,
        info: EnvInfo,
        device: Any,
        state_support: str,
        can_save: bool,
        **kwargs: Any,
    ) -> None:
        # GymWrapper's metaclass adds keyword arguments.
        super().__init__(env=vector, device=torch.device(device), **kwargs)
        self.pwm_info = info
        self.state_support = state_support
        self.can_save_state = can_save
        self._tells_success = vector.envs[0].success is not None
        if self._tells_success:
            batch = self.batch_size
            self.observation_spec["success"] = Categorical(2, (*batch, 1), dtype=torch.bool, device=self.device)
        self._set_seed(info.seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            for i, env in enumerate(self._env.envs):
                env.seed_next_reset(seed + i)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is not None:
            rows = mask.reshape(-1).cpu().numpy()
            if not rows.any():
                return tensordict.exclude("_reset")
            if not rows.all():
                kwargs["options"] = {"reset_mask": rows}
        observation, _ = self._env.reset(**kwargs)
        source = self.read_obs(observation)
        return self._with_success(TensorDict(source, batch_size=self.batch_size).to(self.device))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._with_success(super()._step(tensordict))

    def _with_success(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._tells_success:
            flags = torch.tensor([[env.success] for env in self._env.envs], device=self.device)
            tensordict.set("success", flags)
        return tensordict

    def save_state(self) -> dict[str, Any]:
        """State of all sub-environments: tensors, numbers, strings, lists and dicts of them."""
        return self._env.save()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save_state`."""
        saved = len(state["sub_envs"])
        if saved != self._env.num_envs:
            raise ConfigurationError(
                f"the saved state has {saved} environments and this run {self._env.num_envs} (env.num_envs)"
            )
        self._env.load(state)

    def rename(self, name: str) -> None:
        """Change the name that messages use."""
        for env in self._env.envs:
            env.name = name

    def render_frame(self) -> np.ndarray:
        """Frame of sub-environment 0, uint8 ``[height, width, 3]``."""
        return draw_or_explain(self.pwm_info.name, self._env.envs[0].draw)


def chosen(name: str, entries: Mapping[str, T], keys: Sequence[str] | None) -> dict[str, T]:
    """The entries of an observation that ``env.observation_keys`` selects, in its order.

    Raises:
        ConfigurationError: if an entry is missing.
    """
    if keys is None:
        return dict(entries)
    for key in keys:
        if key not in entries:
            raise ConfigurationError(
                f"env.observation_keys={list(keys)}: {name} observes no {key!r}; it has {', '.join(entries)}"
            )
    return {key: entries[key] for key in keys}


def batch_sub_envs(
    sub_envs: Sequence[SubEnv],
    *,
    seed: int,
    device: Any,
    episode_length: int | None,
    terminates: bool,
    state_support: str,
    can_save: bool,
) -> BatchedEnv:
    """Batch sub-environments of the same kind; sub-environment i gets ``seed + i`` at its first reset."""
    first = sub_envs[0]
    low, high = first.raw_action_range()
    info = EnvInfo(
        name=first.name,
        observation_dim=first.observation_space.shape[0],
        action_dim=first.action_space.shape[0],
        episode_length=episode_length,
        action_repeat=first.action_repeat,
        num_envs=len(sub_envs),
        terminates=terminates,
        seed=seed,
        action_low=tuple(low),
        action_high=tuple(high),
    )
    return BatchedEnv(_VectorEnv(sub_envs), info, device, state_support, can_save)


RawStep = tuple[np.ndarray, float, bool, bool]


class SubEnv(gymnasium.Env, abc.ABC):
    """A simulator with action repeat, action scaling, a time limit in agent steps, and checks of its values.

    Args:
        name (str): label for messages.
        observation_dim (int): O, length of the flat observation.
        low (numpy.ndarray): smallest action of the simulator, ``[A]``.
        high (numpy.ndarray): largest action of the simulator, ``[A]``.
        action_repeat (int): environment steps per agent step; rewards are summed, and a repeat stops at done.
        episode_length (int, optional): agent steps after which to truncate; ``None``: only the simulator truncates.
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
        self.name = self.identity = name  # the user may change the name, which messages use
        self.index = index
        self.action_repeat = action_repeat
        self.episode_length = episode_length
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self._middle, self._half_range = (high + low) / 2, (high - low) / 2
        self.last_seed: int | None = None
        self.pending_seed: int | None = None
        self.agent_steps = 0
        #: Whether the task is solved at this step; ``None`` if the simulator does not report it.
        self.success: bool | None = None

    @abc.abstractmethod
    def _raw_reset(self, seed: int | None) -> np.ndarray:
        """Start an episode, reseeding first if ``seed`` is given; returns the flat observation."""

    @abc.abstractmethod
    def _raw_step(self, action: np.ndarray) -> RawStep:
        """One environment step with an action in the simulator's range: observation, reward, terminated, truncated."""

    @abc.abstractmethod
    def save_simulator(self) -> dict[str, Any]:
        """State of the simulator as tensors and plain values."""

    @abc.abstractmethod
    def load_simulator(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save_simulator`."""

    @abc.abstractmethod
    def draw(self) -> np.ndarray:
        """Frame of the current state, uint8 ``[height, width, 3]``."""

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
        """Reseed the simulator at the next reset."""
        self.pending_seed = seed
        self.last_seed = seed

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One agent step with an action that is clipped to [-1, 1]."""
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
        """The complete state of this sub-environment."""
        return {
            "identity": self.identity,
            "agent_steps": self.agent_steps,
            "last_seed": self.last_seed,
            "pending_seed": self.pending_seed,
            "simulator": self.save_simulator(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`save`."""
        if state["identity"] != self.identity:
            raise ConfigurationError(
                f"the saved state is one of {state['identity']} and this environment is {self.identity} (env)"
            )
        self.agent_steps = state["agent_steps"]
        self.last_seed = state["last_seed"]
        self.load_simulator(state["simulator"])
        self.pending_seed = state["pending_seed"]

    def _checked(self, observation: np.ndarray, reward: float) -> np.ndarray:
        # A finite sum implies finite terms, and one reduction costs half of isfinite(...).all().
        if not np.isfinite(observation.sum() + reward):
            what = "observation" if not np.isfinite(observation).all() else "reward"
            if what == "observation" or not np.isfinite(reward):
                raise self._fault(f"{what} is not finite at step {self.agent_steps}")
        return observation

    def _fault(self, problem: str) -> EnvironmentFault:
        return EnvironmentFault(self.name, problem, seed=self.last_seed, index=self.index)


def check_action_box(name: str, low: np.ndarray, high: np.ndarray) -> None:
    """Raise ConfigurationError unless every action dimension has two finite, different bounds."""
    bad = ~(np.isfinite(low) & np.isfinite(high) & (low < high))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise ConfigurationError(
            f"{name} has an unbounded or empty action range [{low[i]}, {high[i]}] in dimension {i}: actions are scaled "
            "from [-1, 1], so every dimension needs finite bounds (choose another env, or bound its action space)"
        )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
