"""This package's entries in TorchRL's Hydra configuration: importing this module adds ``pwm_*`` to its ConfigStore.

TorchRL's own entries do not change. Scripts do not need to import it: ``hydra_plugins/pwm_torchrl_plugin.py`` does this
when TorchRL's configurations are in use. The application's own configuration (``configs/*.yaml``,
:mod:`pwm_torchrl.config`) is separate and has its own groups.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from pwm_torchrl.plugin.build import (
    MLPDynamicsConfig,
    PWMActorConfig,
    PWMActorLossConfig,
    PWMActorModelConfig,
    PWMCriticEnsembleConfig,
    PWMCriticEnsembleModelConfig,
    PWMDMControlEnvConfig,
    PWMEncoderModelConfig,
    PWMGymnasiumEnvConfig,
    PWMImaginationEnvConfig,
    PWMModelLossConfig,
    PWMMultitaskEnvConfig,
    PWMPolicyModelConfig,
    PWMSliceSamplerConfig,
    PWMTrainedWorldModelConfig,
    PWMTrainerConfig,
    PWMValueLossConfig,
    PWMWorldModelConfig,
    PWMWorldModelModelConfig,
    ResidualDynamicsConfig,
    ResidualEndpointFlowConfig,
    SimNormVelocityFlowConfig,
    TangentFlowConfig,
)

__all__ = [
    "ENTRIES",
    "MLPDynamicsConfig",
    "PWMActorConfig",
    "PWMActorLossConfig",
    "PWMActorModelConfig",
    "PWMCriticEnsembleConfig",
    "PWMCriticEnsembleModelConfig",
    "PWMDMControlEnvConfig",
    "PWMEncoderModelConfig",
    "PWMGymnasiumEnvConfig",
    "PWMImaginationEnvConfig",
    "PWMModelLossConfig",
    "PWMMultitaskEnvConfig",
    "PWMPolicyModelConfig",
    "PWMSliceSamplerConfig",
    "PWMTrainedWorldModelConfig",
    "PWMTrainerConfig",
    "PWMValueLossConfig",
    "PWMWorldModelConfig",
    "PWMWorldModelModelConfig",
    "ResidualDynamicsConfig",
    "ResidualEndpointFlowConfig",
    "SimNormVelocityFlowConfig",
    "TangentFlowConfig",
    "register",
]

#: All entries by group and name. To add one, add a line here.
ENTRIES: dict[tuple[str, str], Any] = {
    ("network", "pwm_world_model"): PWMWorldModelConfig,
    ("network", "pwm_mlp"): MLPDynamicsConfig,
    ("network", "pwm_residual"): ResidualDynamicsConfig,
    ("network", "pwm_flow"): ResidualEndpointFlowConfig,
    ("network", "pwm_flow_v1"): ResidualEndpointFlowConfig(solver="heun", substeps=2),
    ("network", "pwm_flow_v2"): ResidualEndpointFlowConfig(solver="heun", substeps=4),
    ("network", "pwm_flow_v3"): ResidualEndpointFlowConfig(solver="euler", substeps=8),
    ("network", "pwm_tangent_flow"): TangentFlowConfig,
    ("network", "pwm_simnorm_velocity_flow"): SimNormVelocityFlowConfig,
    ("network", "pwm_actor"): PWMActorConfig,
    ("network", "pwm_critic_ensemble"): PWMCriticEnsembleConfig,
    ("model", "pwm_encoder"): PWMEncoderModelConfig,
    ("model", "pwm_world_model"): PWMWorldModelModelConfig,
    ("model", "pwm_trained_world_model"): PWMTrainedWorldModelConfig,
    ("model", "pwm_actor"): PWMActorModelConfig,
    ("model", "pwm_critic_ensemble"): PWMCriticEnsembleModelConfig,
    ("model", "pwm_policy"): PWMPolicyModelConfig,
    ("loss", "pwm_model"): PWMModelLossConfig,
    ("loss", "pwm_actor"): PWMActorLossConfig,
    ("loss", "pwm_value"): PWMValueLossConfig,
    ("env", "pwm_imagination"): PWMImaginationEnvConfig,
    ("env", "pwm_multitask"): PWMMultitaskEnvConfig,
    ("env", "pwm_gymnasium"): PWMGymnasiumEnvConfig,
    ("env", "pwm_dm_control"): PWMDMControlEnvConfig,
    ("sampler", "pwm_slices"): PWMSliceSamplerConfig,
    ("trainer", "pwm"): PWMTrainerConfig,
}


def register() -> None:
    """Add :data:`ENTRIES` to Hydra's ConfigStore. Calling it again is harmless, and needed if the store was cleared."""
    store = ConfigStore.instance()
    for (group, name), node in ENTRIES.items():
        store.store(group=group, name=name, node=node, provider="pwm_torchrl")


register()
