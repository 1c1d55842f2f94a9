"""PWM's objectives: LossModules over TensorDicts around pure functions of tensors.

Imports modules and errors of this package; knows no Hydra, logger, cluster or environment.
"""

from pwm_torchrl.objectives.actor_loss import PWMActorLoss
from pwm_torchrl.objectives.imagination import Imagined, imagine, rollout_return, td_lambda_targets
from pwm_torchrl.objectives.model_loss import PWMModelLoss
from pwm_torchrl.objectives.soft_actor_loss import SoftActorLoss
from pwm_torchrl.objectives.value_loss import PWMValueLoss, ensemble_value_loss

__all__ = [
    "Imagined",
    "PWMActorLoss",
    "PWMModelLoss",
    "PWMValueLoss",
    "SoftActorLoss",
    "ensemble_value_loss",
    "imagine",
    "rollout_return",
    "td_lambda_targets",
]
