"""Group ``network``: what has parameters, as plain modules over tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.modules import NetworkConfig


@dataclass
class MLPDynamicsConfig(NetworkConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.MLPDynamics`."""

    latent_dim: int = MISSING
    action_dim: int = MISSING
    task_dim: int = MISSING
    units: list[int] = MISSING
    simnorm_dim: int = 8
    _target_: str = "pwm_torchrl.modules.MLPDynamics"
    _convert_: str = "all"


@dataclass
class ResidualDynamicsConfig(MLPDynamicsConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.ResidualDynamics`."""

    _target_: str = "pwm_torchrl.modules.ResidualDynamics"


@dataclass
class SimNormVelocityFlowConfig(MLPDynamicsConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.SimNormVelocityFlow`."""

    solver: str = "heun"
    substeps: int = 4
    checkpoint_substeps: bool = False
    _target_: str = "pwm_torchrl.modules.SimNormVelocityFlow"


@dataclass
class TangentFlowConfig(SimNormVelocityFlowConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.TangentFlow`."""

    condition_on_start: bool = False
    time_features: int = 0
    _target_: str = "pwm_torchrl.modules.TangentFlow"


@dataclass
class ResidualEndpointFlowConfig(TangentFlowConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.ResidualEndpointFlow`, the project's flow."""

    condition_on_step_size: bool = False
    _target_: str = "pwm_torchrl.modules.ResidualEndpointFlow"


@dataclass
class PWMWorldModelConfig(NetworkConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.WorldModel`, by its
    :class:`~pwm_torchrl.modules.WorldModelSpec`.

    ``dynamics`` holds keyword arguments of :func:`~pwm_torchrl.modules.make_dynamics`, or one of this group's dynamics:
    ``network@trainer.world_model.dynamics: pwm_flow``. Sizes that those leave open are the world model's.
    """

    observation_dim: int = MISSING
    action_dim: int = MISSING
    latent_dim: int = MISSING
    units: list[int] = MISSING
    encoder_units: list[int] = MISSING
    simnorm_dim: int = 8
    dynamics: Any = field(default_factory=lambda: {"kind": "mlp"})
    reward_head: str = "scalar"
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    reward_space: str = "raw"
    termination: bool = False
    num_tasks: int = 0
    task_dim: int = 0
    action_dims: list[int] = field(default_factory=list)
    normalize_observations: bool = False
    _target_: str = "pwm_torchrl.configs.build.world_model"
    _convert_: str = "all"
    _recursive_: bool = False  # the dynamics' sizes are the world model's, so it is built together with them


@dataclass
class PWMActorConfig(NetworkConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.Actor`."""

    latent_dim: int = MISSING
    action_dim: int = MISSING
    units: list[int] = field(default_factory=lambda: [400, 200, 100])
    log_std_init: float = -1.0
    log_std_min: float = -1.427
    _target_: str = "pwm_torchrl.modules.Actor"
    _convert_: str = "all"


@dataclass
class PWMCriticEnsembleConfig(NetworkConfig):
    """Hydra configuration for :class:`~pwm_torchrl.modules.CriticEnsemble`."""

    latent_dim: int = MISSING
    units: list[int] = field(default_factory=lambda: [400, 200])
    num_critics: int = 3
    _target_: str = "pwm_torchrl.modules.CriticEnsemble"
    _convert_: str = "all"
