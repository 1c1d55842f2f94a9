"""Group ``model``: the networks in their TensorDict shells; keys may be nested, ``[agents, latent]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase


@dataclass
class PWMModelConfig(ConfigBase):
    """What this group's entries share."""

    _partial_: bool = False
    _convert_: str = "all"

    def __post_init__(self) -> None:
        """Nothing to do."""


@dataclass
class PWMEncoderModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.encoder_module`."""

    world_model: Any = MISSING
    observation: Any = "observation"
    latent: Any = "latent"
    task: Any = None
    _target_: str = "pwm_torchrl.configs.build.encoder_model"


@dataclass
class PWMWorldModelModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.world_model_module`."""

    world_model: Any = MISSING
    latent: Any = "latent"
    action: Any = "action"
    next_latent: Any = ("next", "latent")
    reward: Any = ("next", "reward")
    terminated: Any = ("next", "terminated")
    task: Any = None
    _target_: str = "pwm_torchrl.configs.build.world_model_model"


@dataclass
class PWMActorModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.actor_module`."""

    actor: Any = MISSING
    action_spec: Any = None
    latent: Any = "latent"
    action: Any = "action"
    loc: Any = "loc"
    scale: Any = "scale"
    _target_: str = "pwm_torchrl.configs.build.actor_model"


@dataclass
class PWMCriticEnsembleModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.value_module`."""

    critics: Any = MISSING
    latent: Any = "latent"
    state_value: Any = "state_value"
    _target_: str = "pwm_torchrl.configs.build.value_model"


@dataclass
class PWMPolicyModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.policy_module`."""

    world_model: Any = MISSING
    actor: Any = MISSING
    action_spec: Any = None
    observation: Any = "observation"
    latent: Any = "latent"
    action: Any = "action"
    task: Any = None
    _target_: str = "pwm_torchrl.configs.build.policy_model"


@dataclass
class PWMTrainedWorldModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.load_world_model`."""

    run: str = MISSING
    which: str = "best"
    device: Any = "cpu"
    _target_: str = "pwm_torchrl.load_world_model"
