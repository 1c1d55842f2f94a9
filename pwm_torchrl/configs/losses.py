"""Group ``loss``: PWM's three objectives.

``_partial_: true`` leaves the networks to whoever builds them, as :func:`pwm_torchrl.training.make_torchrl_trainer`
does: an interpolation that is used twice would make them twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.objectives import LossConfig

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
    _target_: str = "pwm_torchrl.configs.build.actor_loss"
    _convert_: str = "all"


@dataclass
class PWMValueLossConfig(LossConfig):
    """Hydra configuration for :class:`~pwm_torchrl.objectives.PWMValueLoss`."""

    critics: Any = MISSING
    deactivate_vmap: bool = False
    reduction: str = "mean"
    _target_: str = "pwm_torchrl.objectives.PWMValueLoss"
