"""N sub-environments in one process as one TorchRL environment.

Imports gymnasium; loaded by the makers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical
from torchrl.envs.libs.gym import GymWrapper

from pwm_torchrl.envs.info import EnvInfo
from pwm_torchrl.envs.rendering import draw_or_explain
from pwm_torchrl.envs.sub_env import SubEnv
from pwm_torchrl.errors import ConfigurationError

__all__ = ["BatchedEnv", "batch_sub_envs"]


class _VectorEnv(SyncVectorEnv):
    """gymnasium's serial vector environment, without auto-reset, with seeds and state of its sub-environments."""

    envs: list[SubEnv]

    def __init__(self, sub_envs: Sequence[SubEnv]) -> None:
        super().__init__([lambda env=env: env for env in sub_envs], autoreset_mode=AutoresetMode.DISABLED)

    def save(self) -> dict[str, Any]:
        """State of every sub-environment and the rows that a partial reset hands on unchanged."""
        return {
            "sub_envs": [env.save() for env in self.envs],
            "observations": [None if row is None else torch.tensor(row) for row in self._env_obs],
            "terminated": torch.tensor(self._terminations),
            "truncated": torch.tensor(self._truncations),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`save` gave."""
        for env, saved in zip(self.envs, state["sub_envs"], strict=True):
            env.load(saved)
        rows = state["observations"]
        self._env_obs = [None if row is None else row.numpy().copy() for row in rows]
        self._terminations = state["terminated"].numpy().copy()
        self._truncations = state["truncated"].numpy().copy()
        self._autoreset_envs = self._terminations | self._truncations


class BatchedEnv(GymWrapper):
    """TorchRL environment of batch size ``[N]`` over N sub-environments stepped one after the other.

    One wrapper around a batch is several times faster than a batch of wrappers: TorchRL's cost per step is paid once
    for N environments.

    Args:
        vector (_VectorEnv): the sub-environments.
        info (EnvInfo): facts for :func:`~pwm_torchrl.envs.env_info`.
        device (torch.device): where its tensors are.
        state_support (str): what :func:`~pwm_torchrl.envs.save_env_state` can do, a sentence.
        can_save (bool): whether it can.
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
        # The metaclass of GymWrapper adds keyword arguments of its own.
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
        """Put back what :meth:`save_state` gave."""
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
        """Picture of sub-environment 0, uint8 ``[height, width, 3]``."""
        return draw_or_explain(self.pwm_info.name, self._env.envs[0].draw)


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
    """Batch sub-environments of one kind; sub-environment i gets ``seed + i`` at its first reset."""
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
