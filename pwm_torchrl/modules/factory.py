"""The one construction site of the networks, and the published sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics import make_dynamics
from pwm_torchrl.modules.encoder import Encoder
from pwm_torchrl.modules.heads import RewardHead, ScalarRewardHead, TerminationHead, TwoHotRewardHead
from pwm_torchrl.modules.layers import check_simnorm
from pwm_torchrl.modules.statistics import RunningStatistics
from pwm_torchrl.modules.task import TaskEmbedding
from pwm_torchrl.modules.world_model import WorldModel

REWARD_HEADS = ("scalar", "two_hot")


@dataclass(frozen=True)
class Size:
    """Widths: hidden units of dynamics and heads, of the encoder, latent, task embedding and policy side."""

    units: tuple[int, ...]
    encoder_units: tuple[int, ...]
    latent_dim: int
    task_dim: int = 96
    actor_units: tuple[int, ...] = (400, 200, 100)
    critic_units: tuple[int, ...] = (400, 200)


#: Published sizes (``19m`` has D = 512 in some MT30 checkpoints) and ``tiny``, which learns the quick start.
SIZES: dict[str, Size] = {
    "tiny": Size((128, 128), (128,), 64, 16, (128, 64), (128, 64)),
    "5m": Size((512, 512), (256,), 512),
    "19m": Size((1024, 1024), (1024, 1024), 768),
    "48m": Size((1792, 1792), (1792, 1792, 1792), 768),
    "317m": Size((4096, 4096), (4096, 4096, 4096, 4096), 1376),
}


@dataclass
class WorldModelSpec:
    """Everything that determines a world model's architecture; plain values, so that it can be saved beside weights.

    Args:
        observation_dim (int): ``O``.
        action_dim (int): A, padded to the widest task.
        latent_dim (int): ``D``.
        units (sequence of int): hidden widths of dynamics, reward and termination head.
        encoder_units (sequence of int): hidden widths of the encoder.
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
        dynamics (dict): keyword arguments of :func:`make_dynamics`. Defaults to ``{"kind": "mlp"}``.
        reward_head (str): ``"scalar"`` or ``"two_hot"``. Defaults to ``"scalar"``.
        num_bins (int): two-hot bins. Defaults to ``101``.
        vmin (float): lowest bin, symlog space. Defaults to ``-10.0``.
        vmax (float): highest bin, symlog space. Defaults to ``10.0``.
        reward_space (str): ``"raw"`` or ``"symlog"``. Defaults to ``"raw"``.
        termination (bool): whether to predict termination. Defaults to ``False``.
        num_tasks (int): 0 for a single-task model. Defaults to ``0``.
        task_dim (int): ``E``. Defaults to ``0``.
        action_dims (sequence of int): action dimension per task. Defaults to ``()``.
        normalize_observations (bool): running mean and variance in front of the encoder. Defaults to ``False``.
    """

    observation_dim: int
    action_dim: int
    latent_dim: int
    units: Sequence[int]
    encoder_units: Sequence[int]
    simnorm_dim: int = 8
    dynamics: dict[str, object] = field(default_factory=lambda: {"kind": "mlp"})
    reward_head: str = "scalar"
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    reward_space: str = "raw"
    termination: bool = False
    num_tasks: int = 0
    task_dim: int = 0
    action_dims: Sequence[int] = ()
    normalize_observations: bool = False


def make_world_model(spec: WorldModelSpec) -> WorldModel:
    """Build a world model.

    Raises:
        ConfigurationError: for sizes or names that do not fit; the sentence names the configuration key.
    """
    check_simnorm(spec.latent_dim, spec.simnorm_dim)
    task_dim = spec.task_dim if spec.num_tasks else 0
    step_features = spec.latent_dim + task_dim + spec.action_dim
    reward: RewardHead
    if spec.reward_head == "scalar":
        reward = ScalarRewardHead(step_features, spec.units)
    elif spec.reward_head == "two_hot":
        reward = TwoHotRewardHead(step_features, spec.units, spec.num_bins, spec.vmin, spec.vmax, spec.reward_space)
    else:
        raise ConfigurationError(f"model.reward_head={spec.reward_head!r} is not one of {', '.join(REWARD_HEADS)}.")
    return WorldModel(
        encoder=Encoder(spec.observation_dim, task_dim, spec.encoder_units, spec.latent_dim, spec.simnorm_dim),
        dynamics=make_dynamics(
            latent_dim=spec.latent_dim,
            action_dim=spec.action_dim,
            task_dim=task_dim,
            units=spec.units,
            simnorm_dim=spec.simnorm_dim,
            **spec.dynamics,  # type: ignore[arg-type]
        ),
        reward=reward,
        termination=TerminationHead(spec.latent_dim + task_dim, spec.units) if spec.termination else None,
        task=TaskEmbedding(spec.num_tasks, task_dim, spec.action_dims, spec.action_dim) if spec.num_tasks else None,
        observation_statistics=RunningStatistics((spec.observation_dim,)) if spec.normalize_observations else None,
    )
