"""Integration into TorchRL: PWM's updates in its Trainer, and entries ``pwm_*`` in its ConfigStore.

May import ``run`` and everything that ``run`` may import; only ``pwm_torchrl.configs`` and ``pwm_torchrl.training``
import it.
"""
