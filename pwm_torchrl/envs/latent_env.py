"""Imagination as an environment: any TorchRL algorithm trains inside a world model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.model_based import ModelBasedEnvBase

from pwm_torchrl.envs.latent_model import LatentModel
from pwm_torchrl.envs.latent_specs import STEPS, check_mask, check_task, latent_specs, task_masks
from pwm_torchrl.envs.latent_starts import Start, StartStates
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModel

__all__ = ["LatentImaginationEnv"]


class LatentImaginationEnv(ModelBasedEnvBase):
    """A world model as an environment whose observations are latents.

    A rollout with a policy equals :func:`~pwm_torchrl.objectives.imagine` to the bit, gradients included, but goes
    through TorchRL's collectors, losses and planners. The environment is stateless: the state travels in the
    TensorDict. TorchRL's own ``WorldModelEnv`` takes a real environment's observations for its state and needs one to
    copy specs from; its ``ImaginedEnv`` is for Gaussian beliefs and knows neither reward nor end.

    Args:
        world_model (nn.Module): a :class:`~pwm_torchrl.modules.WorldModel` (with or without tasks, or bound to one), a
            TorchRL :class:`~torchrl.modules.WorldModel`, or a TensorDictModule of one step, from a state and an action
            to the state, ``"reward"`` and perhaps ``"terminated"`` or ``"done"`` under ``"next"``.

    Keyword Args:
        start (Start, optional): where rollouts start. Latents ``[M, D]`` or a TensorDict of states: rows are drawn
            uniformly, with replacement. A :class:`~pwm_torchrl.data.TrajectoryReplay` or TorchRL replay buffer:
            observations are drawn and encoded. A function of the number of states that returns latents or a
            TensorDict, of states or observations. Defaults to ``None``: every reset brings its own states.
        horizon (int, optional): steps after which a rollout is truncated. Defaults to ``None``: never.
        task (int, optional): index of the task of all rollouts, for a model of several tasks. Defaults to ``None``: the
            start holds a task for each.
        action_mask (Tensor, optional): 0 and 1, ``[A]`` or ``[num_tasks, A]``, by which actions are multiplied before
            the model sees them. Defaults to the mask of a model of ours with several tasks.
        differentiable (bool): keep the graph from step to step. Defaults to ``False``.
        snapshot (bool): step a copy of the model that takes no gradient and changes only by :meth:`update_snapshot`.
            Defaults to ``False``: the model itself, which gets gradients if ``differentiable``.
        batch_size (sequence of int): of the environment, which is then locked. Defaults to ``()``: as many rollouts as
            the TensorDict has that it is given.
        device (torch.device or str, optional): Defaults to the model's; another one needs ``snapshot``.
        action_spec (TensorSpec, optional): of one action. Defaults to [−1, 1] for a model of ours.
        latent_spec (TensorSpec, optional): of one state, a Composite for one of several entries. Defaults to what a
            model of ours has, and else to what ``start`` draws.
        observation_key (NestedKey): what the encoder of a model of ours reads. Defaults to ``"observation"``.
        latent_key (NestedKey): state of a model of ours. Defaults to ``"latent"``.
        action_key (NestedKey): action. Defaults to ``"action"``.
        task_key (NestedKey): task index ``[B]``. Defaults to ``"task"``.

    Raises:
        ConfigurationError: if the model, the start or the specs do not fit together.

    .. note:: At the horizon ``truncated`` and ``done`` are true, and ``terminated`` is what the model says; value
        estimators bootstrap from a truncated state as they should.

    .. note:: ``rollout`` samples actions only of a policy whose ``default_interaction_type`` is ``RANDOM``, or inside
        ``set_exploration_type``; TorchRL's default is the mode, from which PPO learns nothing.

    .. note:: States of one's own go in by ``env.reset(states, set_state=True)`` or ``env.rollout(n, policy,
        tensordict=states, set_state=True)``, which start exactly there.

    Examples:
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
                f"device={device} is not the model's, {home}: move the model, or set snapshot=True."
            )
        stepped = deepcopy(world_model).requires_grad_(False).to(device) if snapshot else world_model
        model = LatentModel.of(
            stepped, observation=observation_key, latent=latent_key, action=action_key, task=task_key
        )
        # Not done after a reset by construction; TorchRL's check of that would wait for the device.
        super().__init__(model.step, device=device, batch_size=torch.Size(batch_size), allow_done_after_reset=True)
        # TorchRL calls every model-based environment unlocked, but a batch of its own fixes the shape.
        self.__dict__["_batch_locked"] = bool(self.batch_size)
        self.stepped_model = stepped
        # Not registered: a snapshot's original is no part of the environment.
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
        """Take over the model's present parameters and buffers.

        Raises:
            ConfigurationError: if the environment steps the model itself.
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
        """States of observations, by the model that is stepped, in a TensorDict of their own."""
        return self.starts.complete(tensordict, self.device)

    def mask_action(self, action: Tensor, task: Tensor | None = None) -> Tensor:
        """``action`` with zeros where :attr:`action_mask` has them: what the model sees."""
        if self.action_mask is None:
            return action
        return action * (self.action_mask if self.action_mask.ndim == 1 else self.action_mask[task])

    def any_done(self, tensordict: TensorDictBase) -> bool:
        """Whether a rollout is over; known without waiting for the device where none ever is."""
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
        """Seed what the environment draws itself: rows of given starts. A replay and a function have their own."""
        if seed is not None:
            self.starts.generator.manual_seed(seed)
