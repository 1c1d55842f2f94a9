"""This package in TorchRL: PWM's updates in its Trainer, and entries ``pwm_*`` in its ConfigStore.

May import everything that a run may, and ``run``; only ``pwm_torchrl.configs`` and ``pwm_torchrl.training`` import it.
"""
