"""Imagination as a TorchRL environment, with its specs, start states and world model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, ReplayBuffer, TensorSpec, Unbounded
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.modules import WorldModel as TorchRLWorldModel

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import TaskWorldModel, WorldModel, encoder_module, world_model_module
from pwm_torchrl.objectives.base import check_shape

__all__ = [
    "STEPS",
    "LatentImaginationEnv",
    "LatentModel",
    "LatentSpecs",
    "Start",
    "StartStates",
    "check_mask",
    "check_task",
    "latent_specs",
    "task_masks",
]

#: Entry with the number of steps since the start of a rollout; it is in the data because the environment is stateless.
STEPS = "imagined_steps"


class LatentSpecs(NamedTuple):
    """Specs of one rollout, without batch dimensions."""

    state: Composite  # state entries and the task
    observation: Composite  # the same and, with a horizon, the number of steps
    action: Composite
    reward: TensorSpec
    done: Composite

    def batched(self, batch: torch.Size, device: torch.device) -> LatentSpecs:
        """Specs of a batch of rollouts on a device."""
        specs = [spec.to(device) for spec in self]
        return LatentSpecs(*(spec.expand(*batch, *spec.shape).clone() if batch else spec for spec in specs))


def latent_specs(
    model: LatentModel,
    module: nn.Module,
    horizon: int | None,
    action: TensorSpec | None = None,
    latent: TensorSpec | None = None,
) -> LatentSpecs:
    """Combine the given specs with those derived from a model of this package.

    Args:
        model (LatentModel): the entries of the model.
        module (nn.Module): the world model itself.
        horizon (int, optional): horizon of the environment.
        action (TensorSpec, optional): spec of one action.
        latent (TensorSpec, optional): spec of one state.

    Raises:
        ConfigurationError: if a spec is missing or does not fit the model.
    """
    latent_dim, action_dim = latent_and_action_dims(module)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if latent is None and latent_dim is not None:
        latent = Unbounded((latent_dim,), dtype=dtype)
    if latent is None:
        raise ConfigurationError("latent_spec is needed: it cannot be derived from world_model or start.")
    if action is None and action_dim is not None:
        action = Bounded(-1.0, 1.0, torch.Size([action_dim]), dtype=dtype)
    if action is None:
        raise ConfigurationError("action_spec is needed: it cannot be derived from this world_model.")
    if not isinstance(latent, Composite):
        latent = Composite({model.states[0]: latent})
    if set(latent.keys(True, True)) != set(model.states):
        raise ConfigurationError(
            f"latent_spec has the entries {sorted(map(str, latent.keys(True, True)))}, but states have "
            f"{sorted(map(str, model.states))}."
        )
    state = latent.clone()
    if model.task is not None:
        masks = task_masks(module)
        count = torch.iinfo(torch.int64).max if masks is None else len(masks)
        state[model.task] = Categorical(count, torch.Size([]), dtype=torch.int64)
    observation = state.clone()
    if horizon is not None:
        observation[STEPS] = Unbounded((1,), dtype=torch.int64)
    done = {key: Categorical(2, torch.Size([1]), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
    return LatentSpecs(
        state, observation, Composite({model.action: action}), Unbounded((1,), dtype=dtype), Composite(done)
    )


def task_masks(module: nn.Module) -> Tensor | None:
    """Action masks ``[num_tasks, A]`` of a model of this package with several tasks; ``None`` for any other model."""
    return module.task.action_mask if isinstance(module, WorldModel) and module.task is not None else None


def check_task(model: LatentModel, task: int | None, masks: Tensor | None) -> None:
    """Raise ``ConfigurationError`` if the model has no such task."""
    if task is None:
        return
    if model.task is None:
        raise ConfigurationError(f"task={task} is given, but the world_model reads no task; remove it.")
    if task < 0 or (masks is not None and task >= len(masks)):
        raise ConfigurationError(
            f"task={task} is not one of the world_model's {'' if masks is None else f'{len(masks)} '}tasks."
        )


def check_mask(model: LatentModel, mask: Tensor | None) -> None:
    """Raise ``ConfigurationError`` if a mask has another shape, or rows per task for a model without tasks."""
    if mask is not None and (mask.ndim not in (1, 2) or (mask.ndim == 2 and model.task is None)):
        raise ConfigurationError(
            f"action_mask has shape {list(mask.shape)} instead of [A], or [num_tasks, A] for a world_model with tasks."
        )


def latent_and_action_dims(module: nn.Module) -> tuple[int | None, int | None]:
    """Dimensions D and A of a model of this package, read from its layers; ``None`` if they are unknown."""
    if not isinstance(module, WorldModel):
        return None, None
    encoder, reward = (_linear_layers(part) for part in (module.encoder, module.reward))
    latent = encoder[-1].out_features if encoder else None
    if isinstance(module, TaskWorldModel):
        bound = module.bound_task
        return latent, module.model_action_dim if bound is None else int(bound.mask(module.task_index).sum())
    if module.task is not None:
        return latent, module.task.action_mask.shape[-1]
    return latent, reward[0].in_features - latent if reward and latent is not None else None


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@runtime_checkable
class Observations(Protocol):
    """Interface of this package's replay buffer, :class:`~pwm_torchrl.data.TrajectoryReplay`."""

    def sample_observations(self, count: int) -> Tensor: ...


Start: TypeAlias = Tensor | TensorDictBase | Observations | ReplayBuffer | Callable[[int], Tensor | TensorDictBase]


class StartStates:
    """Draws start states, without gradient.

    Args:
        start (Start, optional): see :class:`~pwm_torchrl.envs.LatentImaginationEnv`.
        model (LatentModel): the model whose encoder converts observations to states.
        task (int, optional): task index of all states. Defaults to ``None``: the start contains the task.
    """

    def __init__(self, start: Start | None, model: LatentModel, task: int | None = None) -> None:
        self.start = start
        self.model = model
        self.task = task
        self.generator = torch.Generator()
        known = (Tensor, TensorDictBase, Observations, ReplayBuffer)
        if start is not None and not isinstance(start, known) and not callable(start):
            raise ConfigurationError(
                f"start is a {type(start).__name__} instead of latents, a TensorDict of them, a replay buffer, or a "
                "function of the number of states."
            )

    def draw(self, count: int, device: torch.device) -> TensorDictBase:
        """Draw states ``[count]`` with the model's state entries and, for several tasks, the task.

        Raises:
            ConfigurationError: if there is no start, or it lacks an entry.
        """
        drawn = self._draw(count)
        if isinstance(drawn, Tensor):
            drawn = TensorDict({self.model.states[0]: drawn}, batch_size=drawn.shape[:1])
        if drawn.shape != (count,):
            raise ConfigurationError(f"start returned states of batch size {list(drawn.shape)} instead of [{count}].")
        with torch.no_grad():
            return self.complete(drawn, device).detach()

    def spec(self, device: torch.device) -> Composite:
        """Spec of a state, derived from a drawn one."""
        drawn = self.draw(1, device)
        entries = {key: drawn.get(key) for key in self.model.states}
        return Composite({key: Unbounded(value.shape[1:], dtype=value.dtype) for key, value in entries.items()})

    def complete(self, drawn: TensorDictBase, device: torch.device) -> TensorDictBase:
        """A new TensorDict with the entries of a state; observations are encoded if there are no states.

        Raises:
            ConfigurationError: if entries are missing.
        """
        states, task = list(self.model.states), self.model.task
        drawn = drawn.to(device)
        if task is not None and self.task is not None:
            drawn = drawn.copy().set(task, torch.full(drawn.batch_size, self.task, device=device))
        if task is not None and drawn.get(task, None) is None:
            raise ConfigurationError(
                f"world_model has several tasks, but the start has no entry {task!r}: add it to the states, or set one "
                "task for all with task=."
            )
        encoder = self.model.encoder
        missing = [key for key in states if drawn.get(key, None) is None]
        if missing and encoder is not None and all(drawn.get(key, None) is not None for key in encoder.in_keys):
            drawn = encoder(drawn.copy())
            missing = [key for key in states if drawn.get(key, None) is None]
        if missing:
            reads = [] if encoder is None else encoder.in_keys
            raise ConfigurationError(
                f"start has the entries {sorted(map(str, drawn.keys(True, True)))} and lacks {missing}: it needs the "
                f"states {states}, or the encoder's inputs {reads}."
            )
        return drawn.select(*states, *([] if task is None else [task]))

    def _draw(self, count: int) -> Tensor | TensorDictBase:
        start = self.start
        if start is None:
            raise ConfigurationError(
                "start=None provides no states: set start, or reset the environment with states, "
                "env.reset(states, set_state=True)."
            )
        if isinstance(start, (Tensor, TensorDictBase)):
            rows = torch.randint(len(start), (count,), generator=self.generator)
            return start[rows.to(start.device or "cpu")]
        if isinstance(start, Observations):
            observations = start.sample_observations(count)
            if self.model.encoder is None:
                raise ConfigurationError("start is a replay of observations, but this world_model has no encoder.")
            return TensorDict({self.model.encoder.in_keys[0]: observations}, batch_size=[count])
        if isinstance(start, ReplayBuffer):
            return start.sample(count).reshape(-1)
        return start(count)


REWARD, TERMINATED, DONE = ("next", "reward"), ("next", "terminated"), ("next", "done")


@dataclass(frozen=True)
class LatentModel:
    """A world model with the entries that it reads and writes.

    Attributes:
        step: one transition, from a state and an action to the entries under ``"next"``.
        encoder: converts observations to states; ``None`` if the model has no encoder.
        states: entries of the state; ``step`` also writes each of them under ``"next"``.
        action: entry of the action.
        task: entry of the task index; ``None`` for a model without tasks.
        ended: entry of the termination flag; ``None`` if the model writes none.
        terminates: whether the flag can be true.
    """

    step: TensorDictModuleBase
    encoder: TensorDictModuleBase | None
    states: tuple[NestedKey, ...]
    action: NestedKey
    task: NestedKey | None
    ended: tuple[str, str] | None
    terminates: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        observation: NestedKey = "observation",
        latent: NestedKey = "latent",
        action: NestedKey = "action",
        task: NestedKey = "task",
    ) -> LatentModel:
        """Wrap a world model. Keys of other models are read from their modules.

        Args:
            model (nn.Module): a :class:`~pwm_torchrl.modules.WorldModel`, a TorchRL
                :class:`~torchrl.modules.WorldModel`, or a TensorDictModule of one step.

        Keyword Args:
            observation (NestedKey): observation, only for this package's models. Defaults to ``"observation"``.
            latent (NestedKey): state, only for this package's models. Defaults to ``"latent"``.
            action (NestedKey): action, for any model. Defaults to ``"action"``.
            task (NestedKey): task index, for any model that reads one. Defaults to ``"task"``.

        Raises:
            ConfigurationError: if it is none of these, or its entries do not fit an environment.
        """
        if isinstance(model, WorldModel):
            key = None if model.task is None else task
            step = world_model_module(
                model, latent=latent, action=action, next_latent=unravel_key(("next", latent)), task=key
            )
            encoder = encoder_module(model, observation=observation, latent=latent, task=key)
            terminates = model.termination is not None
            return cls(step, encoder, (unravel_key(latent),), unravel_key(action), key, TERMINATED, terminates)
        if isinstance(model, TorchRLWorldModel):
            return cls._foreign(model.step_module, model.encoder, action, task)
        if isinstance(model, TensorDictModuleBase):
            return cls._foreign(model, None, action, task)
        raise ConfigurationError(
            f"world_model is a {type(model).__name__} instead of pwm_torchrl's WorldModel, TorchRL's WorldModel, or a "
            "TensorDictModule of one step."
        )

    @classmethod
    def _foreign(
        cls, step: TensorDictModuleBase, encoder: TensorDictModuleBase | None, action: NestedKey, task: NestedKey
    ) -> LatentModel:
        reads = [unravel_key(key) for key in step.in_keys]
        writes = [unravel_key(key) for key in step.out_keys]
        action, task = unravel_key(action), unravel_key(task)
        states = tuple(key for key in reads if unravel_key(("next", key)) in writes)
        others = [key for key in reads if key not in states and key not in (action, task)]
        if not states or others or action not in reads or REWARD not in writes:
            raise ConfigurationError(
                f"world_model reads {reads} and writes {writes}: its step must read a state that it also writes under "
                f"'next', the action {action!r}, optionally the task {task!r}, nothing else, and write {REWARD}."
            )
        ended = next((key for key in (TERMINATED, DONE) if key in writes), None)
        return cls(step, encoder, states, action, task if task in reads else None, ended, ended is not None)

    def predict(self, inputs: TensorDictBase) -> TensorDictBase:
        """Run one step from the state, action and task in ``inputs``, which are not changed.

        Returns:
            TensorDictBase: the next state's entries, ``"reward"`` ``[..., 1]`` and boolean ``"terminated"``
            ``[..., 1]``.

        Raises:
            ValueError: if reward or termination have another shape.
            ConfigurationError: if termination is not boolean.
        """
        read = [*self.states, self.action, *([] if self.task is None else [self.task])]
        following = self.step(inputs.select(*read)).get("next")
        shape = (*inputs.batch_size, 1)
        reward = following.get("reward")
        check_shape("reward of the world_model", reward, shape)
        if self.ended is None:
            terminated = torch.zeros_like(reward, dtype=torch.bool)
        else:
            terminated = following.get(self.ended[1:])
            check_shape("termination of the world_model", terminated, shape)
        if terminated.dtype != torch.bool:
            raise ConfigurationError(f"world_model writes {self.ended} as {terminated.dtype} instead of torch.bool.")
        return following.select(*self.states).update({"reward": reward, "terminated": terminated})


class LatentImaginationEnv(ModelBasedEnvBase):
    """A world model as an environment whose observations are latents.

    A rollout with a policy is bitwise equal to :func:`~pwm_torchrl.objectives.imagine`, including gradients, and works
    with TorchRL's collectors, losses and planners. The environment is stateless: the state is in the TensorDict.
    TorchRL's ``WorldModelEnv`` uses a real environment's observations as its state and copies its specs; its
    ``ImaginedEnv`` is for Gaussian beliefs and has neither rewards nor terminations.

    Args:
        world_model (nn.Module): a :class:`~pwm_torchrl.modules.WorldModel` (with or without tasks, or bound to one), a
            TorchRL :class:`~torchrl.modules.WorldModel`, or a TensorDictModule of one step, which maps a state and an
            action to the state, ``"reward"`` and optionally ``"terminated"`` or ``"done"`` under ``"next"``.

    Keyword Args:
        start (Start, optional): source of start states. Latents ``[M, D]`` or a TensorDict of states: rows are drawn
            uniformly, with replacement. A :class:`~pwm_torchrl.data.TrajectoryReplay` or a TorchRL replay buffer:
            observations are drawn and encoded. A function of the number of states: returns latents or a TensorDict, of
            states or observations. Defaults to ``None``: each reset must be given states.
        horizon (int, optional): number of steps after which a rollout is truncated. Defaults to ``None``, never.
        task (int, optional): task index of all rollouts, for a model with several tasks. Defaults to ``None``: the
            start contains the tasks.
        action_mask (Tensor, optional): zeros and ones, ``[A]`` or ``[num_tasks, A]``, multiplied with the actions
            before the model reads them. Defaults to the mask of a model of this package with several tasks.
        differentiable (bool): keep the graph from step to step. Defaults to ``False``.
        snapshot (bool): step a copy of the model without gradients, which changes only by :meth:`update_snapshot`.
            Defaults to ``False``: the model itself, which gets gradients if ``differentiable``.
        batch_size (sequence of int): batch size of the environment, which is then locked. Defaults to ``()``: the batch
            size of the given TensorDict.
        device (torch.device or str, optional): Defaults to the model's; another one requires ``snapshot``.
        action_spec (TensorSpec, optional): spec of one action. Defaults to [−1, 1] for a model of this package.
        latent_spec (TensorSpec, optional): spec of one state, a Composite for several entries. Defaults to that of a
            model of this package, otherwise to that of the states that ``start`` draws.
        observation_key (NestedKey): observation, only for a model of this package. Defaults to ``"observation"``.
        latent_key (NestedKey): state, only for a model of this package. Defaults to ``"latent"``.
        action_key (NestedKey): action. Defaults to ``"action"``.
        task_key (NestedKey): task index ``[B]``. Defaults to ``"task"``.

    Raises:
        ConfigurationError: if the model, the start or the specs do not fit together.

    .. note:: At the horizon, ``truncated`` and ``done`` are true and ``terminated`` is the model's prediction, so value
        estimators bootstrap from the truncated state.

    .. note:: ``rollout`` samples actions only if the policy's ``default_interaction_type`` is ``RANDOM``, or inside
        ``set_exploration_type``. TorchRL's default is the mode, with which PPO does not learn.

    .. note:: To start from given states, use ``env.reset(states, set_state=True)`` or ``env.rollout(n, policy,
        tensordict=states, set_state=True)``.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.envs import LatentImaginationEnv
        >>> from pwm_torchrl.modules import WorldModelSpec, make_world_model
        >>> model = make_world_model(WorldModelSpec(3, 1, 16, [32], [32]))
        >>> env = LatentImaginationEnv(model, start=model.encode(torch.randn(100, 3)), horizon=5, batch_size=[8])
        >>> rollout = env.rollout(100)
        >>> rollout["next", "latent"].shape
        torch.Size([8, 5, 16])
        >>> rollout["next", "truncated"].squeeze(-1)[0]
        tensor([False, False, False, False,  True])
    """

    _supports_set_state = True

    def __init__(
        self,
        world_model: nn.Module,
        *,
        start: Start | None = None,
        horizon: int | None = None,
        task: int | None = None,
        action_mask: Tensor | None = None,
        differentiable: bool = False,
        snapshot: bool = False,
        batch_size: Sequence[int] = (),
        device: torch.device | str | None = None,
        action_spec: TensorSpec | None = None,
        latent_spec: TensorSpec | None = None,
        observation_key: NestedKey = "observation",
        latent_key: NestedKey = "latent",
        action_key: NestedKey = "action",
        task_key: NestedKey = "task",
    ) -> None:
        if horizon is not None and horizon < 1:
            raise ConfigurationError(f"horizon={horizon} must be at least 1, or None.")
        home = next((tensor.device for tensor in world_model.parameters()), torch.device("cpu"))
        device = home if device is None else torch.empty((), device=device).device
        if device != home and not snapshot:
            raise ConfigurationError(
                f"device={device} differs from the model's device {home}: move the model, or set snapshot=True."
            )
        stepped = deepcopy(world_model).requires_grad_(False).to(device) if snapshot else world_model
        model = LatentModel.of(
            stepped, observation=observation_key, latent=latent_key, action=action_key, task=task_key
        )
        # A reset never returns done states; TorchRL's check of this would synchronise with the device.
        super().__init__(model.step, device=device, batch_size=torch.Size(batch_size), allow_done_after_reset=True)
        # TorchRL marks all model-based environments as unlocked, but a given batch size fixes the shape.
        self.__dict__["_batch_locked"] = bool(self.batch_size)
        self.stepped_model = stepped
        # Not registered as a submodule: the original of a snapshot is not part of the environment.
        self.__dict__["source"] = world_model if snapshot else None
        self.model = model
        self.horizon = horizon
        self.differentiable = differentiable
        masks = task_masks(stepped)
        check_task(model, task, masks)
        self.starts = StartStates(start, model, task)
        mask = masks if action_mask is None else action_mask
        check_mask(model, mask)
        self.register_buffer("action_mask", None if mask is None else mask.to(device), persistent=False)
        if latent_spec is None and start is not None and not isinstance(stepped, WorldModel):
            latent_spec = self.starts.spec(device)
        specs = latent_specs(model, stepped, horizon, action_spec, latent_spec).batched(self.batch_size, device)
        self.observation_spec, self.state_spec = specs.observation, specs.state
        self.full_action_spec, self.reward_spec, self.full_done_spec = specs.action, specs.reward, specs.done

    def update_snapshot(self) -> None:
        """Copy the model's current parameters and buffers into the snapshot.

        Raises:
            ConfigurationError: if the environment has no snapshot.
        """
        if self.source is None:
            raise ConfigurationError("snapshot=False: the environment steps the model itself, which is always current.")
        with torch.no_grad():
            for own, current in (
                *zip(self.stepped_model.parameters(), self.source.parameters(), strict=True),
                *zip(self.stepped_model.buffers(), self.source.buffers(), strict=True),
            ):
                own.copy_(current)

    @torch.no_grad()
    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encode observations to states in a new TensorDict."""
        return self.starts.complete(tensordict, self.device)

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """``action`` multiplied with :attr:`action_mask`, as the model reads it."""
        if self.action_mask is None:
            return action
        return action * (self.action_mask if self.action_mask.ndim == 1 else self.action_mask[task])

    def any_done(self, tensordict: TensorDictBase) -> bool:
        """Whether any rollout is done; does not synchronise with the device if none can be."""
        return (self.horizon is not None or self.model.terminates) and super().any_done(tensordict)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        task = None if self.model.task is None else tensordict.get(self.model.task)
        action = self.mask_action(tensordict.get(self.model.action), task)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            out = self.model.predict(tensordict.copy().set(self.model.action, action))
        if self.model.task is not None:
            out.set(self.model.task, task)
        terminated = out.get("terminated")
        truncated = torch.zeros_like(terminated)
        if self.horizon is not None:
            before = tensordict.get(STEPS, None)
            steps = (torch.zeros_like(terminated, dtype=torch.int64) if before is None else before) + 1
            out.set(STEPS, steps)
            truncated = steps >= self.horizon
        out.update({"truncated": truncated, "done": terminated | truncated})
        stepping = tensordict.get("_step", None)
        if stepping is None:
            return out
        return torch.where(
            stepping.view(out.shape), out, self._skip_tensordict(tensordict).select(*out.keys(True, True))
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        shape = self.batch_size if tensordict is None else tensordict.batch_size
        if tensordict is not None and kwargs.get("set_state"):
            state = self.starts.complete(tensordict, self.device)
            state = state if self.differentiable else state.detach()
        else:
            state = self.starts.draw(shape.numel(), self.device).reshape(shape)
        zero = torch.zeros(*shape, 1, device=self.device)
        if self.horizon is not None:
            state.set(STEPS, zero.long())
        return state.update({key: zero.bool() for key in ("done", "terminated", "truncated")})

    def __repr__(self) -> str:
        model, batch = type(self.stepped_model).__name__, list(self.batch_size)
        return f"{type(self).__name__}({model}, horizon={self.horizon}, batch_size={batch}, device={self.device})"

    def _set_seed(self, seed: int | None) -> None:
        """Seed the draws from given start states; replay buffers and functions use their own generators."""
        if seed is not None:
            self.starts.generator.manual_seed(seed)
