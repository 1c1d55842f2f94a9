"""PWM's objectives: TorchRL LossModules around pure functions of tensors.

May import ``modules``, the configuration's schema and errors; must not depend on Hydra, loggers, environments or the
cluster.
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
