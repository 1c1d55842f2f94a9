"""Group ``sampler``: slices of trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from torchrl.trainers.algorithms.configs.data import SamplerConfig

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
    _target_: str = "pwm_torchrl.configs.build.slice_sampler"
    _convert_: str = "all"
