"""Latent dynamics d(z, a, e) -> z': MLP, residual and flow-matching kinds.

Plain ``nn.Module``s over tensors. They may import only layers and top-level modules such as the errors.
"""

from pwm_torchrl.modules.dynamics.base import Dynamics, FlowDynamics, MLPDynamics, count_parameters
from pwm_torchrl.modules.dynamics.factory import KINDS, PARAMETERIZATIONS, SOLVERS, dynamics_class, make_dynamics
from pwm_torchrl.modules.dynamics.flows import (
    ResidualDynamics,
    ResidualEndpointFlow,
    SimNormVelocityFlow,
    TangentFlow,
    VelocityFlow,
    residual_endpoint,
)

__all__ = [
    "KINDS",
    "PARAMETERIZATIONS",
    "SOLVERS",
    "Dynamics",
    "FlowDynamics",
    "MLPDynamics",
    "ResidualDynamics",
    "ResidualEndpointFlow",
    "SimNormVelocityFlow",
    "TangentFlow",
    "VelocityFlow",
    "count_parameters",
    "dynamics_class",
    "make_dynamics",
    "residual_endpoint",
]
