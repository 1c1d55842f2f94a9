"""Facts of a run's environment, with as little construction as possible, and the report that ``check_env`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from pwm_torchrl.envs.dflex import missing_dflex
from pwm_torchrl.envs.env_state import env_state_support
from pwm_torchrl.envs.factory import as_stated, opened_env, probe_env
from pwm_torchrl.envs.makers import probe_task_env, require_brax
from pwm_torchrl.envs.rewarped import require_rewarped
from pwm_torchrl.envs.standard import EnvInfo, env_info
from pwm_torchrl.envs.tasks.registry import task_info
from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.user_code import locate

__all__ = ["report_env"]

#: Observation and action dimensions of dflex's tasks, for login nodes without dflex.
DFLEX_DIMENSIONS = {
    "dflex_hopper": (11, 3),
    "dflex_ant": (37, 8),
    "dflex_anymal": (49, 12),
    "dflex_humanoid": (76, 21),
    "dflex_snu_humanoid": (53, 152),
}

#: Maker of the task registry's environments; the registry knows their facts.
TASK_MAKER = "pwm_torchrl.envs.make_task_env"


def environment_facts(env_cfg: Mapping[str, Any]) -> EnvInfo:
    """Facts of the environments that a configuration describes.

    Unless the registry knows them, one environment is made and closed, which may draw global random numbers. If dflex
    is not installed, the stored dimensions of its tasks are used.

    Args:
        env_cfg (Mapping): as for :func:`~pwm_torchrl.envs.make_env`.

    Raises:
        ConfigurationError: if the environment cannot be made.
        MissingLibraryError: if a library other than dflex is not installed.
    """
    num_envs = int(env_cfg.get("num_envs") or 1)
    if env_cfg.get("_target_") == TASK_MAKER and env_cfg.get("task"):
        task = task_info(str(env_cfg["task"]))
        length = int(env_cfg.get("episode_length") or task.episode_length)
        info = EnvInfo(
            str(env_cfg.get("name") or task.name),
            task.observation_dim,
            task.action_dim,
            length,
            task.action_repeat,
            num_envs,
            terminates=task.terminates,
        )
        return as_stated(info, env_cfg)
    try:
        return probe_env(env_cfg, {"env.num_envs": num_envs})
    except MissingLibraryError:
        name = str(env_cfg.get("name"))
        known = f"dflex_{name.removeprefix('dflex_')}"
        if known not in DFLEX_DIMENSIONS or not str(env_cfg.get("_target_")).endswith(".make_dflex_env"):
            raise
        observation_dim, action_dim = DFLEX_DIMENSIONS[known]
        length = int(env_cfg.get("episode_length") or 1000)
        terminates = bool(env_cfg.get("early_termination", True))
        info = EnvInfo(
            name,
            observation_dim,
            action_dim,
            length,
            1,
            num_envs,
            terminates,
            action_low=(-1.0,) * action_dim,
            action_high=(1.0,) * action_dim,
        )
        return as_stated(info, env_cfg)


def opened_facts(
    env_cfg: Mapping[str, Any], sizes: Mapping[str, int], *, device: torch.device | str = "cpu"
) -> EnvInfo:
    """Facts of an environment that is made and closed, even if its facts are already known.

    Args:
        env_cfg (Mapping): as for :func:`~pwm_torchrl.envs.make_env`.
        sizes (Mapping): as for :func:`~pwm_torchrl.envs.factory.probe_env`.

    Keyword Args:
        device (torch.device or str): device of the environment. Defaults to ``"cpu"``.

    Raises:
        ConfigurationError: if it cannot be made or used.
    """
    registered = env_cfg.get("_target_") == TASK_MAKER and env_cfg.get("task")
    return (probe_task_env if registered else probe_env)(env_cfg, sizes, device=device)


def require_maker(env_cfg: Mapping[str, Any]) -> None:
    """Check that the maker exists, without making an environment, which may need a GPU that this machine lacks.

    Raises:
        ConfigurationError: if there is no such maker.
        MissingLibraryError: if its library is not installed.
    """
    target = str(env_cfg.get("_target_"))
    locate("env._target_", target)
    if target.endswith(".make_dflex_env"):
        module = str(env_cfg.get("module") or "dflex.envs")
        if find_spec(module.partition(".")[0]) is None:
            raise missing_dflex(env_cfg.get("name"), module)
    if target.endswith(".make_brax_env"):
        require_brax(env_cfg.get("id"))
    if target.endswith(".make_rewarped_env"):
        require_rewarped(env_cfg.get("name"))


_STEPS = 200  # random agent steps per environment


def report_env(env_cfg: Mapping[str, Any], num_envs: int, seed: int = 0) -> str:
    """Make an environment, take random steps, and describe it.

    Args:
        env_cfg (Mapping): the configuration group ``env``.
        num_envs (int): ``N``.
        seed (int): seed of sub-environment 0. Defaults to ``0``.

    Returns:
        str: several lines of text: dimensions and ranges, action scaling, episode length, how episodes end, which state
        can be saved, and the results of random actions.

    Raises:
        ConfigurationError: if the environment cannot be used.
        EnvironmentFault: if it fails during the random steps.
    """
    with opened_env(env_cfg, num_envs=num_envs, seed=seed) as env:
        info = env_info(env)
        lines = [*_facts(env, info), f"state to save     {env_state_support(env)}", *_trial(env)]
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
    """Take random steps with a separate random generator, and describe the results."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = env.rollout(_STEPS, RandomPolicy(env.action_spec), break_when_any_done=False)["next"]
    observation, reward = data["observation"], data["reward"]
    return [
        f"{_STEPS} random steps  rewards {reward.min():.3g} to {reward.max():.3g}, mean {reward.mean():.3g}; "
        f"observations {observation.min():.3g} to {observation.max():.3g}; "
        f"{int(data['terminated'].sum())} terminations, {int(data['truncated'].sum())} truncations; all finite",
    ]
