"""Group ``env``: imagination, and real environments with actions in [−1, 1] and one observation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.envs import EnvConfig

# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.


@dataclass
class PWMImaginationEnvConfig(EnvConfig):
    """Hydra configuration for :class:`~pwm_torchrl.envs.LatentImaginationEnv`.

    ``world_model`` is made with the environment, for example ``model@env.world_model: pwm_trained_world_model``; one
    that is still learning is given in code, since Hydra would make it again.
    """

    world_model: Any = MISSING
    start: Any = None
    horizon: Optional[int] = None
    task: Optional[int] = None
    action_mask: Any = None
    differentiable: bool = False
    snapshot: bool = False
    batch_size: list[int] = field(default_factory=list)
    device: Any = None
    action_spec: Any = None
    latent_spec: Any = None
    observation_key: Any = "observation"
    latent_key: Any = "latent"
    action_key: Any = "action"
    task_key: Any = "task"
    _target_: str = "pwm_torchrl.configs.build.imagination_env"
    _convert_: str = "all"


@dataclass
class PWMMultitaskEnvConfig(EnvConfig):
    """Hydra configuration for :func:`~pwm_torchrl.envs.make_task_env`: a task of MT30, of MT80 or of one's own."""

    task: str = MISSING
    num_envs: int = 1
    seed: int = 0
    device: Any = "cpu"
    episode_length: Optional[int] = None
    render: bool = False
    _target_: str = "pwm_torchrl.envs.make_task_env"


@dataclass
class PWMGymnasiumEnvConfig(EnvConfig):
    """Hydra configuration for :func:`~pwm_torchrl.envs.make_gymnasium_env`.

    Arguments of the environment itself are added: ``+env.healthy_reward=0``.
    """

    id: str = MISSING
    num_envs: int = 1
    seed: int = 0
    device: Any = "cpu"
    action_repeat: int = 1
    episode_length: Optional[int] = None
    render: bool = False
    _target_: str = "pwm_torchrl.envs.make_gymnasium_env"


@dataclass
class PWMDMControlEnvConfig(EnvConfig):
    """Hydra configuration for :func:`~pwm_torchrl.envs.make_dm_control_env`."""

    domain: str = MISSING
    task: str = MISSING
    num_envs: int = 1
    seed: int = 0
    device: Any = "cpu"
    action_repeat: int = 2
    episode_length: Optional[int] = None
    render: bool = False
    _target_: str = "pwm_torchrl.envs.make_dm_control_env"
