"""Classes of TorchRL's ConfigStore for this package's networks, losses, environments, sampler and trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.data import SamplerConfig
from torchrl.trainers.algorithms.configs.envs import EnvConfig
from torchrl.trainers.algorithms.configs.modules import NetworkConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig


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
    _target_: str = "pwm_torchrl.plugin.build.world_model"
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
    _target_: str = "pwm_torchrl.plugin.build.encoder_model"


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
    _target_: str = "pwm_torchrl.plugin.build.world_model_model"


@dataclass
class PWMActorModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.actor_module`."""

    actor: Any = MISSING
    action_spec: Any = None
    latent: Any = "latent"
    action: Any = "action"
    loc: Any = "loc"
    scale: Any = "scale"
    _target_: str = "pwm_torchrl.plugin.build.actor_model"


@dataclass
class PWMCriticEnsembleModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.modules.value_module`."""

    critics: Any = MISSING
    latent: Any = "latent"
    state_value: Any = "state_value"
    _target_: str = "pwm_torchrl.plugin.build.value_model"


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
    _target_: str = "pwm_torchrl.plugin.build.policy_model"


@dataclass
class PWMTrainedWorldModelConfig(PWMModelConfig):
    """Hydra configuration for :func:`~pwm_torchrl.load_world_model`."""

    run: str = MISSING
    which: str = "best"
    device: Any = "cpu"
    _target_: str = "pwm_torchrl.load_world_model"


# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.


@dataclass
class PWMModelLossConfig(LossConfig):
    """Hydra configuration for :class:`~pwm_torchrl.objectives.PWMModelLoss`."""

    world_model: Any = MISSING
    form: str = "pwm"
    gamma: float = 0.99
    rho: Optional[float] = None
    dynamics_coef: Optional[float] = None
    reward_coef: Optional[float] = None
    termination_coef: float = 1.0
    rollout_weight: float = 1.0
    flow_matching_weight: float = 0.0
    flow_matching_source: str = "teacher"
    self_consistency_weight: float = 0.0
    reduction: str = "mean"
    delay_target: bool = False
    compile: bool = False
    precision: str = "fp32"
    _target_: str = "pwm_torchrl.objectives.PWMModelLoss"


@dataclass
class PWMActorLossConfig(LossConfig):
    """Hydra configuration for :class:`~pwm_torchrl.objectives.PWMActorLoss`.

    ``action_mask`` may be lists of 0 and 1.
    """

    actor_network: Any = MISSING
    world_model: Any = MISSING
    value_network: Any = MISSING
    horizon: int = 16
    gamma: float = 0.99
    lmbda: float = 0.95
    detach: bool = True
    normalize_returns: bool = False
    deterministic: bool = False
    entropy_weight: float = 0.0
    action_mask: Any = None
    reduction: str = "mean"
    delay_value: bool = False
    compile: bool = False
    precision: str = "fp32"
    _target_: str = "pwm_torchrl.plugin.build.actor_loss"
    _convert_: str = "all"


@dataclass
class PWMValueLossConfig(LossConfig):
    """Hydra configuration for :class:`~pwm_torchrl.objectives.PWMValueLoss`."""

    critics: Any = MISSING
    deactivate_vmap: bool = False
    reduction: str = "mean"
    precision: str = "fp32"
    _target_: str = "pwm_torchrl.objectives.PWMValueLoss"


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
    _target_: str = "pwm_torchrl.plugin.build.imagination_env"
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


# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.


@dataclass
class PWMSliceSamplerConfig(SamplerConfig):
    """Hydra configuration for :class:`~torchrl.data.SliceSampler` whose keys arrive as keys.

    TorchRL's own ``slice`` hands ``("next", "truncated")`` over as a ``ListConfig``, with which sampling fails.
    """

    num_slices: Optional[int] = None
    slice_len: Optional[int] = None
    end_key: Any = None
    end_keys: Any = None
    traj_key: Any = None
    step_key: Any = "step_count"
    fragmented: bool = False
    ends: Any = None
    trajectories: Any = None
    cache_values: bool = False
    truncated_key: Any = ("next", "truncated")
    init_key: Any = "is_init"
    strict_length: bool = True
    pad_output: bool = False
    compile: Any = False
    span: Any = False
    use_gpu: Any = False
    _target_: str = "pwm_torchrl.plugin.build.slice_sampler"
    _convert_: str = "all"


# ``Optional[...]`` instead of ``... | None``: OmegaConf resolves these hints at run time, on Python 3.10 too.


@dataclass
class PWMTrainerConfig(TrainerConfig):
    """Hydra configuration for :func:`~pwm_torchrl.training.make_torchrl_trainer`.

    World model, actor and critics are described here, once; collector and losses have ``_partial_: true`` and get them
    from the trainer, so that all parts share one set of networks. ``algorithm`` holds keys of
    :class:`~pwm_torchrl.config.AlgorithmConfig`.
    """

    collector: Any = MISSING
    total_frames: int = MISSING
    replay_buffer: Any = MISSING
    world_model: Any = MISSING
    actor: Any = MISSING
    critics: Any = MISSING
    model_loss: Any = None
    loss_module: Any = None
    value_loss: Any = None
    algorithm: Any = None
    frame_skip: int = 1
    logger: Any = None
    progress_bar: bool = True
    seed: Optional[int] = None
    save_trainer_interval: int = 10000
    log_interval: int = 10000
    save_trainer_file: Any = None
    checkpoint: Any = None
    checkpoint_rotation: Any = None
    checkpoint_metadata: Any = None
    log_rewards: bool = True
    hooks: Any = None
    _target_: str = "pwm_torchrl.training.make_torchrl_trainer"
    _convert_: str = "all"
