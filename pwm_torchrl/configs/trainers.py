"""Group ``trainer``: PWM as one of TorchRL's algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

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
