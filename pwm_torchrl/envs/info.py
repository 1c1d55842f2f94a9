"""Facts of an environment that training, tables and reports use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchrl.envs import EnvBase, TransformedEnv

__all__ = ["EnvInfo", "env_info", "env_layers"]


@dataclass(frozen=True)
class EnvInfo:
    """Facts of an environment.

    Attributes:
        name: label for tables and messages.
        observation_dim: length of the flat observation.
        action_dim: length of the action.
        episode_length: agent steps after which an episode is truncated, ``None`` if there is no limit.
        action_repeat: environment steps per agent step.
        num_envs: size of the batch.
        terminates: whether an episode can end by termination, in addition to its time limit.
        seed: seed of sub-environment 0; sub-environment i has ``seed + i``.
        action_dims: length of the action in each task, for several tasks that are padded to the widest one; empty for a
            single task.
        action_low: smallest action in the simulator's units, which is scaled to -1; empty if it is not known without
            creating the environment.
        action_high: largest action in the simulator's units, which is scaled to 1; empty in the same case.
        simulator: the :class:`~pwm_torchrl.envs.differentiable.Simulator` of a differentiable environment.
    """

    name: str
    observation_dim: int
    action_dim: int
    episode_length: int | None
    action_repeat: int
    num_envs: int
    terminates: bool
    seed: int = 0
    action_dims: tuple[int, ...] = ()
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    simulator: Any = field(default=None, compare=False, repr=False)


def env_layers(env: Any) -> Iterator[Any]:
    """``env`` and the environments inside TorchRL's transforms, outermost first; does not enter batches."""
    while env is not None:
        yield env
        env = env.base_env if isinstance(env, TransformedEnv) else None


def env_info(env: EnvBase) -> EnvInfo:
    """Facts of an environment made by :func:`~pwm_torchrl.envs.make_env` or one of the makers.

    Args:
        env (EnvBase): the environment, possibly inside further transforms.

    Returns:
        EnvInfo: its facts.

    Raises:
        TypeError: if the environment was not made by this package.
    """
    for layer in env_layers(env):
        info = layer.__dict__.get("pwm_info")
        if info is not None:
            return info
    raise TypeError(
        f"{type(env).__name__} was not made by pwm_torchrl.envs: pass it through pwm_torchrl.envs.standardize first"
    )
