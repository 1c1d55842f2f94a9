"""Everything that has parameters: plain ``nn.Module``s over tensors, and their TensorDict shells.

Imports errors and the commands' names of this package and nothing else of it; knows no Hydra, logger, cluster or
environment.
"""

from pwm_torchrl.modules.actor_critic import (
    Actor,
    CriticEnsemble,
    action_value_module,
    actor_module,
    encoder_module,
    policy_module,
    value_module,
    world_model_module,
)
from pwm_torchrl.modules.dynamics import (
    Dynamics,
    FlowDynamics,
    MLPDynamics,
    ResidualDynamics,
    ResidualEndpointFlow,
    SimNormVelocityFlow,
    TangentFlow,
    count_parameters,
    make_dynamics,
)
from pwm_torchrl.modules.heads import (
    Encoder,
    RewardHead,
    ScalarRewardHead,
    TerminationHead,
    TwoHotCodec,
    TwoHotRewardHead,
    symexp,
    symlog,
)
from pwm_torchrl.modules.layers import NormedLinear, RewardDeviation, RewardScale, RunningStatistics, SimNorm
from pwm_torchrl.modules.model_files import (
    LoadReport,
    WorldModelFacts,
    announce_world_model,
    load_pwm_world_model,
    load_tdmpc2_world_model,
    read_world_model,
    save_world_model,
    world_model_facts,
)
from pwm_torchrl.modules.world_model import (
    TaskEmbedding,
    TaskWorldModel,
    WorldModel,
    WorldModelSpec,
    make_world_model,
)

__all__ = [
    "Actor",
    "CriticEnsemble",
    "Dynamics",
    "Encoder",
    "FlowDynamics",
    "LoadReport",
    "MLPDynamics",
    "NormedLinear",
    "ResidualDynamics",
    "ResidualEndpointFlow",
    "RewardDeviation",
    "RewardHead",
    "RewardScale",
    "RunningStatistics",
    "ScalarRewardHead",
    "SimNorm",
    "SimNormVelocityFlow",
    "TangentFlow",
    "TaskEmbedding",
    "TaskWorldModel",
    "TerminationHead",
    "TwoHotCodec",
    "TwoHotRewardHead",
    "WorldModel",
    "WorldModelFacts",
    "WorldModelSpec",
    "action_value_module",
    "actor_module",
    "announce_world_model",
    "count_parameters",
    "encoder_module",
    "load_pwm_world_model",
    "load_tdmpc2_world_model",
    "make_dynamics",
    "make_world_model",
    "policy_module",
    "read_world_model",
    "save_world_model",
    "symexp",
    "symlog",
    "value_module",
    "world_model_facts",
    "world_model_module",
]
