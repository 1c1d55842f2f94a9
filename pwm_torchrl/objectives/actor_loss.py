"""Policy loss over TensorDicts: first-order gradients through imagined rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from pwm_torchrl.modules import RunningStatistics
from pwm_torchrl.objectives.base import check_shape
from pwm_torchrl.objectives.functional import (
    apart,
    delayed,
    distribution_parameters,
    frozen,
    maybe_compiled,
    swapped,
    tensor_function,
)
from pwm_torchrl.objectives.imagination import Imagined, alive_before, imagine, rollout_return, squashed_entropy
from pwm_torchrl.objectives.policy_updates import PolicyUpdates

RETURN_EPSILON = 1e-5


class PWMActorLoss(PolicyUpdates):
    """Negative return of imagined rollouts, differentiated through model and reward.

    From start latents z_0 the policy acts for H steps in the model; J = Σ_{t<H} γ^t r_t + γ^H V(z_H), and the loss is
    −mean(J) / H, or −mean(J) / sqrt(Var + 1e-5) with the running variance of J. World model and value network get no
    gradient. Reference: https://arxiv.org/abs/2407.02466.

    Args:
        actor_network (TensorDictModule): ``latent`` -> ``loc``, ``scale`` of a Gaussian before tanh, or a
            :class:`~torchrl.modules.ProbabilisticActor` around such a module; its parameters are those of the loss.
        world_model (TensorDictModule): ``latent``, ``action`` (and ``task``) -> ``("next", latent)``,
            ``("next", reward)``, ``("next", terminated)``; see :func:`~pwm_torchrl.modules.world_model_module`.
        value_network (TensorDictModule): ``latent`` -> ``state_value``.

    Keyword Args:
        horizon (int): ``H``. Defaults to ``16``.
        gamma (float): discount. Defaults to ``0.99``.
        lmbda (float): λ of the value targets written to the rollout. Defaults to ``0.95``.
        detach (bool): stop the gradient at the actor's input. Defaults to ``True``.
        normalize_returns (bool): divide by the running standard deviation of J instead of H. Defaults to ``False``.
        deterministic (bool): act with tanh(loc), without noise. Defaults to ``False``.
        entropy_weight (float): weight of the policy's entropy, mean over steps, beside the scaled −mean(J); it enters
            the gradient and not the value of ``loss_actor``. PWM has none. Without it, actions may saturate where they
            matter and take those with them for which J gives no gradient. Defaults to ``0.0``.
        action_mask (Tensor, optional): ``[num_tasks, A]`` of 0 and 1, for multi-task models; needs ``task`` in the
            input. Defaults to ``None``.
        reduction (str): ``"mean"`` or ``"sum"`` over rollouts, or ``"none"``, which leaves ``loss_actor`` ``[B, 1]``.
            Defaults to ``"mean"``.
        delay_value (bool): take values from parameters that follow the value network's, moved by a TorchRL target
            updater such as :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``False``, its own.
        compile (bool): compile the imagined rollout as one graph. Defaults to ``False``.

    The input holds ``latent`` ``[B, D]`` (and ``task`` ``[B]``). The output is a TensorDict with ``loss_actor`` and
    detached metrics; :meth:`rollout_and_loss` also gives the rollout, from which critics learn, and :meth:`backward`
    does so a micro-batch at a time.

    .. note:: TorchRL's LossModule forces deterministic exploration inside ``forward``; the noise here is drawn
        explicitly and is not affected.

    Examples:
        >>> from pwm_torchrl.modules import *
        >>> model = make_world_model(WorldModelSpec(3, 1, 16, [32], [32]))
        >>> loss = PWMActorLoss(
        ...     actor_module(Actor(16, 1, [32])),
        ...     world_model_module(model),
        ...     value_module(CriticEnsemble(16, [32])),
        ...     horizon=4,
        ... )
        >>> start = TensorDict(latent=model.encode(torch.randn(8, 3)).detach(), batch_size=[8])
        >>> loss(start)["loss_actor"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys:
        """Configurable keys.

        Attributes:
            latent (NestedKey): start latents. Defaults to ``"latent"``.
            action (NestedKey): action of the world model. Defaults to ``"action"``.
            reward (NestedKey): reward, under "next". Defaults to ``"reward"``.
            terminated (NestedKey): termination, under "next". Defaults to ``"terminated"``.
            state_value (NestedKey): output of the value network. Defaults to ``"state_value"``.
            value_target (NestedKey): TD(λ) target in the rollout. Defaults to ``"value_target"``.
            loc (NestedKey): mean before tanh. Defaults to ``"loc"``.
            scale (NestedKey): standard deviation before tanh. Defaults to ``"scale"``.
            task (NestedKey): task index. Defaults to ``"task"``.
        """

        latent: NestedKey = "latent"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        state_value: NestedKey = "state_value"
        value_target: NestedKey = "value_target"
        loc: NestedKey = "loc"
        scale: NestedKey = "scale"
        task: NestedKey = "task"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    actor_network: TensorDictModuleBase
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    action_mask: Tensor | None

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        world_model: TensorDictModuleBase,
        value_network: TensorDictModuleBase,
        *,
        horizon: int = 16,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        detach: bool = True,
        normalize_returns: bool = False,
        deterministic: bool = False,
        entropy_weight: float = 0.0,
        action_mask: Tensor | None = None,
        reduction: str = "mean",
        delay_value: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(gamma, lmbda, reduction)
        if horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1.")
        if entropy_weight < 0 or (entropy_weight and deterministic):
            raise ValueError(
                f"entropy_weight={entropy_weight} must not be negative, and 0 for a deterministic policy, which has "
                "no entropy."
            )
        actor_network = distribution_parameters(actor_network)
        self.convert_to_functional(actor_network, "actor_network")
        # Where layers are shared, the policy's are trained and those of the model and the values are not.
        self.__dict__["actor_network"] = apart(actor_network, world_model, value_network)
        # Not registered: their parameters are no parameters of this loss (as in TorchRL's DreamerActorLoss).
        self.__dict__["world_model"] = world_model
        self.__dict__["value_network"] = value_network
        if delay_value:
            self.target_value_network_params = delayed(value_network, world_model)
            self._has_update_associated["value_network"] = False
        self._imagine = maybe_compiled(imagine, compile)
        self.horizon = horizon
        self.detach = detach
        self.normalize_returns = normalize_returns
        self.deterministic = deterministic
        self.entropy_weight = entropy_weight
        self.return_statistics = RunningStatistics()
        self.register_buffer("action_mask", action_mask)

    @property
    def value_network_params(self) -> TensorDictBase:
        """The value network's parameters as they are now; no parameters of this loss."""
        return TensorDict.from_module(self.value_network)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> PWMActorLoss:
        # They are no submodules, but the loss computes with them and goes nowhere without.
        for network in (self.world_model, self.value_network):
            network._apply(fn)
        super()._apply(fn)
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.latent] if self.action_mask is None else [keys.latent, keys.task]

    @property
    def written_keys(self) -> list[NestedKey]:
        return ["loss_actor", "imagined_return", "imagined_reward", "return_std", "terminated"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss and metrics of rollouts from latents ``[B, D]``; updates the return statistics."""
        return self.rollout_and_loss(tensordict)[0]

    def draw_noise(self, latent: Tensor) -> Tensor | None:
        """Standard normal action noise ``[H, B, A]`` for start latents ``[B, D]``; ``None`` if deterministic."""
        if self.deterministic:
            return None
        with torch.no_grad(), swapped(self.actor_network_params, self.actor_network):
            action_dim = self._policy_parameters()(latent[:1])[0].shape[-1]
        return torch.randn(self.horizon, latent.shape[0], action_dim, dtype=latent.dtype, device=latent.device)

    def _policy_parameters(self) -> Callable[..., tuple[Tensor, ...]]:
        keys = self.tensor_keys
        return tensor_function(self.actor_network, [keys.latent], [keys.loc, keys.scale])

    def imagine(
        self, start: Tensor, task: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Imagined, Tensor]:
        """Differentiable rollout from ``[B, D]`` and V(z_1) .. V(z_H) ``[H, B, 1]``.

        Args:
            start (Tensor): start latents ``[B, D]``.
            task (Tensor, optional): task index ``[B]``.
            noise (Tensor, optional): of :meth:`draw_noise`, which is called if it is ``None``.
        """
        keys = self.tensor_keys
        check_shape("latent", start, (None, None))
        noise = self.draw_noise(start) if noise is None else noise
        task_keys = [] if task is None else [keys.task]
        act = self._policy_parameters()
        model = tensor_function(
            self.world_model,
            [keys.latent, keys.action, *task_keys],
            [("next", keys.latent), ("next", keys.reward), ("next", keys.terminated)],
        )
        value = tensor_function(self.value_network, [keys.latent], [keys.state_value])
        tasks = [] if task is None else [task]
        mask = None if task is None or self.action_mask is None else self.action_mask[task]

        def policy(latent: Tensor, noise: Tensor | None) -> Tensor:
            loc, scale = act(latent)
            action = torch.tanh(loc if noise is None else loc + scale * noise)
            return action if mask is None else action * mask

        values = self.target_value_network_params  # detached, whether they are delayed or not
        with (
            frozen(self.world_model),
            swapped(values, self.value_network),
            swapped(self.actor_network_params, self.actor_network),
        ):
            rollout = self._imagine(
                lambda latent, action: model(latent, action, *tasks),
                policy,
                start.detach(),
                self.horizon,
                noise,
                self.detach,
            )
            return rollout, value(rollout.latent[1:])[0]

    def returns(self, rollout: Imagined, next_value: Tensor) -> Tensor:
        """J ``[B, 1]`` of every rollout."""
        return rollout_return(rollout.reward, rollout.terminated, next_value[-1], self.gamma)

    def objective(self, rollout: Imagined, next_value: Tensor, bonus: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, J ``[B, 1]``); with return normalisation, J enters the running variance first."""
        returns = self.returns(rollout, next_value)
        return self.reduced(-returns - bonus) / self.divisor(returns), returns

    def entropy_bonus(self, rollout: Imagined, noise: Tensor | None, task: Tensor | None = None) -> Tensor | float:
        """What is added to J ``[B, 1]``: value 0, and the gradient of the weighted entropy.

        It is in the units of J: times H, or the running standard deviation so far, by which J is divided. States do not
        change for its sake.

        Args:
            rollout (Imagined): of :meth:`imagine`.
            noise (Tensor, optional): what it was imagined with, ``[H, B, A]``.
            task (Tensor, optional): task index ``[B]``; padded actions have no entropy.
        """
        if not self.entropy_weight or noise is None:
            return 0.0
        with swapped(self.actor_network_params, self.actor_network):
            loc, scale = self._policy_parameters()(rollout.latent[:-1].detach())
        entropy = squashed_entropy(loc, scale, noise)
        if task is not None and self.action_mask is not None:
            entropy = entropy * self.action_mask[task]
        alive = alive_before(rollout.terminated)[:-1]
        bonus = self.entropy_weight * self._scale() * (entropy.sum(-1, keepdim=True) * alive).mean(0)
        return bonus - bonus.detach()

    def _scale(self) -> Tensor | int:
        """What J is divided by, as far as is known before it enters the running variance."""
        if not self.normalize_returns:
            return self.horizon
        return torch.sqrt(self.return_statistics.var + RETURN_EPSILON).squeeze()

    def divisor(self, returns: Tensor) -> Tensor | int:
        """What −mean(J) is divided by: H, or the running standard deviation after J has entered it."""
        if self.normalize_returns:
            self.return_statistics.update(returns)
        return self._scale()

    def rollout_and_loss(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Losses, and the detached rollout ``[B, H]`` for :class:`~pwm_torchrl.objectives.PWMValueLoss`.

        Returns:
            tuple: TensorDict of scalars, and a TensorDict ``[B, H]`` of ``latent``, ``action``, ``("next", reward)``,
            ``("next", terminated)``, ``("next", state_value)``, ``value_target`` and the mask
            ``("collector", "mask")`` of states before the rollout's end.
        """
        start, task = self.start(tensordict)
        noise = self.draw_noise(start)
        rollout, next_value = self.imagine(start, task, noise)
        loss, returns = self.objective(rollout, next_value, self.entropy_bonus(rollout, noise, task))
        imagined = self.detached(rollout, next_value)
        return self.metrics(loss, returns, imagined), imagined

    def start(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """Start latents ``[B, D]`` and, for multi-task models, tasks ``[B]``."""
        keys = self.tensor_keys
        latent = tensordict[keys.latent]
        check_shape("latent", latent, (None, None))
        return latent, None if self.action_mask is None else tensordict[keys.task]

    def metrics(self, loss: Tensor, returns: Tensor, imagined: TensorDictBase) -> TensorDictBase:
        """What ``forward`` returns, of returns J ``[B, 1]`` and a detached rollout ``[B, H]``."""
        keys = self.tensor_keys
        return TensorDict(
            loss_actor=loss,
            imagined_return=returns.detach().mean(),
            imagined_reward=imagined.get(("next", keys.reward)).mean(),
            return_std=returns.detach().std(unbiased=False),
            terminated=imagined.get(("next", keys.terminated)).any(1).float().mean(),
        )
