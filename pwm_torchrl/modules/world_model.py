"""The world model: task embedding, the module, the specification of its architecture, and the view of a single task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics import Dynamics, make_dynamics
from pwm_torchrl.modules.heads import Encoder, RewardHead, ScalarRewardHead, TerminationHead, TwoHotRewardHead
from pwm_torchrl.modules.layers import (
    Piece,
    RewardDeviation,
    RunningStatistics,
    check_simnorm,
    init_world_model_weights,
)

#: Normalised observations are clipped to this: a dimension that was constant so far could otherwise reach hundreds.
OBSERVATION_CLIP = 10.0

# Task conditioning of multi-task models: embedding and action mask ----------------------------------------------------


class TaskEmbedding(nn.Module):
    """Learned task embeddings of norm at most 1, and the mask of each task's real action dimensions.

    Args:
        num_tasks (int): number of tasks.
        task_dim (int): embedding width, E.
        action_dims (sequence of int): action dimension of every task.
        action_dim (int): padded action width; at least ``max(action_dims)``.

    Raises:
        ConfigurationError: if ``action_dims`` does not have one entry in ``[1, action_dim]`` per task.
    """

    action_mask: Tensor

    def __init__(self, num_tasks: int, task_dim: int, action_dims: Sequence[int], action_dim: int) -> None:
        super().__init__()
        if len(action_dims) != num_tasks or not all(1 <= d <= action_dim for d in action_dims):
            raise ConfigurationError(
                f"action_dims={list(action_dims)} must have one entry between 1 and {action_dim} for each of the "
                f"{num_tasks} tasks."
            )
        # `forward` applies the maximum norm out of place: nn.Embedding's max_norm changes the weight in place, also in
        # evaluation, and breaks functional calls and torch.compile.
        self.embedding = nn.Embedding(num_tasks, task_dim)
        init_world_model_weights(self.embedding)
        mask = torch.zeros(num_tasks, action_dim)
        for task, dim in enumerate(action_dims):
            mask[task, :dim] = 1.0
        self.register_buffer("action_mask", mask, persistent=False)

    def forward(self, task: Tensor) -> Tensor:
        """Embeddings ``[..., E]`` of task indices, int64 ``[...]``."""
        vector = self.embedding(task)
        # No gradient flows through the rescaling, as in nn.Embedding, which differentiates the rescaled weight.
        rescaled = vector.detach() / vector.detach().norm(dim=-1, keepdim=True).clamp_min(1.0)
        return vector + (rescaled - vector.detach())

    def mask(self, task: Tensor) -> Tensor:
        """Mask ``[..., A]``, 1 on the action dimensions of each task."""
        return self.action_mask[task]


# The latent world model: encoder, dynamics, reward and termination heads, task conditioning ---------------------------


class WorldModel(nn.Module):
    """Latent world model of PWM and TD-MPC2 (https://arxiv.org/abs/2407.02466, https://arxiv.org/abs/2310.16828).

    Shapes: observation ``[..., O]``, action ``[..., A]`` in [−1, 1], latent ``[..., D]``, task int64 with dimensions
    that broadcast against the leading ones of the others. Works on tensors;
    :mod:`pwm_torchrl.modules.actor_critic` wraps its parts as TensorDictModules.

    Args:
        encoder (Encoder): h(o, e) -> z.
        dynamics (Dynamics): d(z, a, e) -> z'.
        reward (RewardHead): R(z, a, e) -> logits.
        termination (TerminationHead, optional): for environments that terminate.
        task (TaskEmbedding, optional): for multi-task models.
        observation_statistics (RunningStatistics, optional): normalises the encoder's input; a multi-task model has one
            row per task.
        reward_deviation (RewardDeviation, optional): unit of a scalar reward head.
    """

    def __init__(
        self,
        encoder: Encoder,
        dynamics: Dynamics,
        reward: RewardHead,
        termination: TerminationHead | None = None,
        task: TaskEmbedding | None = None,
        observation_statistics: RunningStatistics | None = None,
        reward_deviation: RewardDeviation | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dynamics = dynamics
        self.reward = reward
        self.termination = termination
        self.task = task
        self.observation_statistics = observation_statistics
        self.reward_deviation = reward_deviation

    def reset_parameters(self) -> None:
        """Re-initialise every network; running statistics are kept."""
        self.apply(init_world_model_weights)
        self.reward.reset_parameters()

    def compile_pieces(self) -> None:
        """Compile the evaluation of the dynamics network from now on; see :class:`~pwm_torchrl.modules.layers.Piece`.

        This affects custom dynamics only if they evaluate their network through their ``piece``.
        """
        if self.dynamics.piece is None:
            self.dynamics.piece = Piece()

    def embed(self, task: Tensor | None) -> Tensor | None:
        """Task embedding ``[..., E]``; ``None`` for a single-task model.

        Raises:
            ValueError: if a multi-task model gets no task, or a single-task model gets one.
        """
        if (self.task is None) != (task is None):
            raise ValueError(
                "This world model is multi-task and needs a task index."
                if task is None
                else "This world model is single-task and takes no task index."
            )
        return None if self.task is None else self.task(task)

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Set the padding dimensions of ``action`` to 0 for each task; the identity without tasks."""
        return action if self.task is None or task is None else action * self.task.mask(task)

    def encode(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent ``[..., D]``."""
        if self.observation_statistics is not None:
            own = self.statistics_task(task)
            observation = self.observation_statistics.normalize(observation, clip=OBSERVATION_CLIP, task=own)
        return self.encoder(observation, self.embed(task))

    def statistics_task(self, task: Tensor | None) -> Tensor | None:
        """Index of the task whose statistics normalise observations; ``None`` for a single-task model."""
        return task

    def predict(
        self, latent: Tensor, action: Tensor, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One imagined transition, with the few-step map if the dynamics have one; actions are masked for the task.

        Args:
            latent (Tensor): z ``[..., D]``.
            action (Tensor): ``[..., A]``.
            task (Tensor, optional): int64, for multi-task models.

        Returns:
            tuple: next latent ``[..., D]``, reward logits ``[..., bins]``, termination logit ``[..., 1]`` or ``None``.
        """
        embedding = self.embed(task)
        action = self.mask_action(action, task)
        next_latent = self.dynamics.imagine(latent, action, embedding)
        logits = self.reward(latent, action, embedding)
        termination = None if self.termination is None else self.termination(next_latent, embedding)
        return next_latent, logits, termination

    def rescale(self) -> None:
        """Rescale a scalar reward head to the current reward unit, if there is one."""
        if self.reward_deviation is not None and isinstance(self.reward, ScalarRewardHead):
            self.reward.rescale(self.reward_deviation.value)

    def statistics(self) -> dict[str, Tensor]:
        """The buffers of the running statistics by name; collected data change them, updates do not."""
        named = (
            ("observation_statistics", self.observation_statistics),
            ("reward_deviation", self.reward_deviation),
        )
        return {
            f"{name}.{key}": buffer
            for name, module in named
            if module is not None
            for key, buffer in module.named_buffers()
        }

    def soft_step(self, latent: Tensor, action: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One imagined step: next latent, decoded reward, and termination probability ``[..., 1]`` without gradient."""
        next_latent, logits, termination = self.predict(latent, action, task)
        reward = self.reward.decode(logits)
        ended = torch.zeros_like(reward) if termination is None else termination.detach().sigmoid()
        return next_latent, reward, ended

    def forward(self, latent: Tensor, action: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """One imagined step: next latent ``[..., D]``, decoded reward ``[..., 1]``, terminated bool ``[..., 1]``."""
        next_latent, logits, termination = self.predict(latent, action, task)
        reward = self.reward.decode(logits)
        if self.termination is None or termination is None:
            terminated = torch.zeros_like(reward, dtype=torch.bool)
        else:
            terminated = self.termination.terminated(termination)
        return next_latent, reward, terminated


# Building a world model from its specification ------------------------------------------------------------------------


REWARD_HEADS = ("scalar", "two_hot")


@dataclass
class WorldModelSpec:
    """Everything that determines a world model's architecture, in plain values that can be saved with the weights.

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
        normalize_observations (bool): normalise observations by running mean and variance, per task. Defaults to
            ``False``.
        scale_rewards (bool): let a scalar reward head compute in units of the rewards' running standard deviation.
            Defaults to ``False``.
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
    scale_rewards: bool = False


def make_world_model(spec: WorldModelSpec) -> WorldModel:
    """Build a world model.

    Raises:
        ConfigurationError: for invalid sizes or names; the message gives the configuration key.
    """
    check_simnorm(spec.latent_dim, spec.simnorm_dim)
    task_dim = spec.task_dim if spec.num_tasks else 0
    step_features = spec.latent_dim + task_dim + spec.action_dim
    of_observations = (spec.num_tasks, spec.observation_dim) if spec.num_tasks else (spec.observation_dim,)
    reward: RewardHead
    if spec.reward_head == "scalar":
        reward = ScalarRewardHead(step_features, spec.units, spec.scale_rewards)
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
        observation_statistics=RunningStatistics(of_observations) if spec.normalize_observations else None,
        reward_deviation=RewardDeviation() if spec.scale_rewards else None,
    )


# One task's view of a multi-task world model --------------------------------------------------------------------------


class TaskWorldModel(WorldModel):
    """A multi-task world model bound to one of its tasks, with the interface of a single-task model.

    Observations and actions have the task's own dimensions and are padded with zeros inside; for actions this is
    equivalent to the multi-task model's mask. Parameters are shared with the multi-task model.

    Args:
        world_model (WorldModel): multi-task, or single-task for ``task=0``.
        spec (WorldModelSpec): its architecture.
        task (int): index of the task.
        observation_dim (int): O of the task.
        action_dim (int): A of the task.

    Raises:
        ConfigurationError: if the model does not have the task, or has other dimensions for it.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.modules import TaskWorldModel, WorldModelSpec, make_world_model
        >>> spec = WorldModelSpec(8, 2, 16, [32], [32], num_tasks=2, task_dim=4, action_dims=(1, 2))
        >>> bound = TaskWorldModel(make_world_model(spec), spec, task=0, observation_dim=3, action_dim=1)
        >>> bound.encode(torch.zeros(5, 3)).shape
        torch.Size([5, 16])
    """

    task_index: Tensor

    def __init__(
        self, world_model: WorldModel, spec: WorldModelSpec, task: int, observation_dim: int, action_dim: int
    ) -> None:
        super().__init__(
            world_model.encoder,
            world_model.dynamics,
            world_model.reward,
            world_model.termination,
            observation_statistics=world_model.observation_statistics,
            reward_deviation=world_model.reward_deviation,
        )
        #: Not named ``task``, since a model with a ``task`` requires a task index.
        self.bound_task = world_model.task
        self.model_observation_dim, self.model_action_dim = spec.observation_dim, spec.action_dim
        self.register_buffer("task_index", torch.tensor(task), persistent=False)
        count = max(1, spec.num_tasks)
        if not 0 <= task < count:
            raise ConfigurationError(f"task={task} is not one of the world model's {count} tasks.")
        own = spec.action_dims[task] if spec.num_tasks else spec.action_dim
        if observation_dim > spec.observation_dim or action_dim != own:
            raise ConfigurationError(
                f"Task {task} of the world model has {own} action dimensions and at most {spec.observation_dim} of "
                f"observation, not {action_dim} and {observation_dim}."
            )

    def load_multi_task(self, world_model: WorldModel) -> None:
        """Load the parameters of a multi-task model of the same architecture."""
        state = world_model.state_dict()
        self.load_state_dict({_bound_name(name): tensor for name, tensor in state.items()})

    def embed(self, task: Tensor | None = None) -> Tensor | None:
        """The bound task's embedding ``[E]``; ``None`` for a single-task model."""
        if task is not None:
            return super().embed(task)
        return None if self.bound_task is None else self.bound_task(self.task_index)

    def statistics_task(self, task: Tensor | None) -> Tensor | None:
        """The bound task's index; ``None`` for a single-task model."""
        return None if self.bound_task is None else self.task_index

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """``action`` ``[..., A]``, padded with zeros to the model's width."""
        return F.pad(action, (0, self.model_action_dim - action.shape[-1]))

    def encode(self, observation: Tensor, task: Tensor | None = None) -> Tensor:
        """Latent ``[..., D]`` of the task's observations ``[..., O]``."""
        return super().encode(F.pad(observation, (0, self.model_observation_dim - observation.shape[-1])), task)


def _bound_name(name: str) -> str:
    return f"bound_{name}" if name.startswith("task.") else name
