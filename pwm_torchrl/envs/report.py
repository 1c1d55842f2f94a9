"""What ``launch/check_env.py`` prints: whether an environment can be used, and how it will be treated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from pwm_torchrl.envs.factory import make_env
from pwm_torchrl.envs.info import EnvInfo, env_info
from pwm_torchrl.envs.state import env_state_support

__all__ = ["report_env"]

_STEPS = 200  # random agent steps per environment


def report_env(env_cfg: Mapping[str, Any], num_envs: int, seed: int = 0) -> str:
    """Make an environment, take some random steps, and describe it.

    Args:
        env_cfg (Mapping): the configuration group ``env``.
        num_envs (int): ``N``.
        seed (int): seed of sub-environment 0. Defaults to ``0``.

    Returns:
        str: several lines of text: dimensions and ranges, action scaling, episode length, how episodes end, what state
        can be saved, and what random actions did.

    Raises:
        ConfigurationError: if the environment cannot be used.
        EnvironmentFault: if it fails during the random steps.
    """
    env = make_env(env_cfg, num_envs=num_envs, seed=seed)
    try:
        info = env_info(env)
        lines = [*_facts(env, info), f"state to save     {env_state_support(env)}", *_trial(env)]
    finally:
        env.close(raise_if_closed=False)
    return "\n".join(lines)


def _facts(env: EnvBase, info: EnvInfo) -> list[str]:
    limit = info.episode_length
    length = "no limit known: set env.episode_length if episodes never end" if limit is None else (
        f"{limit} agent steps = {limit * info.action_repeat} environment steps"
    )  # fmt: skip
    return [
        f"environment       {info.name} x {info.num_envs}, seeds {info.seed} to {info.seed + info.num_envs - 1}",
        f"observation       {list(env.observation_spec['observation'].shape)} float32",
        f"action            {list(env.action_spec.shape)} float32 in [-1, 1], scaled to {_raw_range(info)}",
        f"action repeat     {info.action_repeat} environment steps per agent step, rewards summed",
        f"episode length    {length}",
        f"termination       {'possible: bootstraps 0' if info.terminates else 'none: episodes only truncate'}; "
        "truncation bootstraps the last real observation",
    ]


def _raw_range(info: EnvInfo) -> str:
    """The environment's own action range."""
    low, high = info.action_low, info.action_high
    if len(set(low)) == 1 and len(set(high)) == 1:
        return f"[{low[0]:g}, {high[0]:g}]"
    return " ".join(f"[{a:g}, {b:g}]" for a, b in zip(low, high))


def _trial(env: EnvBase) -> list[str]:
    """A few random steps, with generators of their own, and what came out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = env.rollout(_STEPS, RandomPolicy(env.action_spec), break_when_any_done=False)["next"]
    observation, reward = data["observation"], data["reward"]
    return [
        f"{_STEPS} random steps  rewards {reward.min():.3g} to {reward.max():.3g}, mean {reward.mean():.3g}; "
        f"observations {observation.min():.3g} to {observation.max():.3g}; "
        f"{int(data['terminated'].sum())} terminations, {int(data['truncated'].sum())} truncations; all finite",
    ]
