"""Actor loss of the published PWM: first-order gradients through imagined rollouts.

Covers everything from start latents to gradients: the rollout, its return and entropy bonus, the value targets for the
critics, and gradients that add up over micro-batches and ranks to those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from pwm_torchrl.modules import RunningStatistics, WorldModel
from pwm_torchrl.modules.numerics import products_in
from pwm_torchrl.objectives.base import (
    Gradients,
    PWMLoss,
    apart,
    check_shape,
    delayed,
    distribution_parameters,
    frozen,
    hand_out,
    micro_batches,
    plus_gradients,
    swapped,
    tensor_function,
)
from pwm_torchrl.objectives.imagination import (
    Imagined,
    Step,
    alive_before,
    imagine,
    rollout_return,
    squashed_entropy,
    td_lambda_targets,
)

RETURN_EPSILON = 1e-5


class Accumulated(NamedTuple):
    """The sum over the micro-batches of an actor update, before the gradients are divided."""

    gradients: Gradients  # of −mean(J), one per parameter; None for those that J does not depend on
    returns: Tensor  # J [B, 1]
    rollouts: TensorDictBase  # [B, H], detached


def detached_rollout(
    rollout: Imagined, next_value: Tensor, targets: Tensor, keys: PWMActorLoss._AcceptedKeys
) -> TensorDictBase:
    """A rollout without its autograd graph, batch-major ``[B, H]``.

    Args:
        rollout (Imagined): time-major.
        next_value (Tensor): V(z_1) .. V(z_H) ``[H, B, 1]``.
        targets (Tensor): value targets of z_0 .. z_{H-1} ``[H, B, 1]``.
        keys (PWMActorLoss._AcceptedKeys): names of the output entries.
    """
    horizon, batch = rollout.reward.shape[:2]
    ended = rollout.terminated
    imagined = TensorDict({}, batch_size=[batch, horizon])
    for key, value in (
        (keys.latent, rollout.latent[:-1]),
        (keys.action, rollout.action),
        (("next", keys.reward), rollout.reward),
        (("next", keys.terminated), ended),
        (("next", keys.state_value), next_value),
        (keys.value_target, targets),
        (("collector", "mask"), alive_before(ended)[:-1] > 0),
    ):
        imagined.set(key, value.detach().transpose(0, 1))
    return imagined


@torch.no_grad()
def estimated_targets(
    estimator: ValueEstimatorBase, rollout: Imagined, next_value: Tensor, latent: NestedKey
) -> Tensor:
    """Value targets ``[H, B, 1]`` from one of TorchRL's estimators.

    An estimator with its own value network evaluates the rollout's latents, which it reads under the key ``latent``.
    """
    keys = estimator.tensor_keys
    if not rollout.reward.numel():  # a share of a batch may be empty, which TorchRL's estimators do not support
        return rollout.reward.detach()
    states = rollout.latent.detach().transpose(0, 1)
    data = TensorDict({}, batch_size=[states.shape[0], states.shape[1] - 1])
    for key, value in (
        (latent, states[:, :-1]),
        (("next", latent), states[:, 1:]),
        (("next", keys.reward), rollout.reward.detach().transpose(0, 1)),
        (("next", keys.done), rollout.terminated.transpose(0, 1)),
        (("next", keys.terminated), rollout.terminated.transpose(0, 1)),
    ):
        data.set(key, value)
    own = estimator.value_network is not None
    target = estimator.value_estimate(data, next_value=None if own else next_value.detach().transpose(0, 1))
    return target.transpose(0, 1)


class PWMActorLoss(PWMLoss):
    r"""Negative return of imagined rollouts, differentiated through dynamics and reward.

    The policy acts in the model for H steps from start latents z_0:

    .. math::

        J = \sum_{t<H} \gamma^t \hat r_t + \gamma^H V(z_H), \qquad
        L = -\frac{\operatorname{mean}(J)}{H} \quad\text{or}\quad
        L = -\frac{\operatorname{mean}(J)}{\sqrt{\mathrm{Var} + 10^{-5}}}

    The second form, with the running variance of J, is used with ``normalize_returns``. Rewards and values after a
    termination in the model count as 0. World model and value network get no gradient. Reference:
    https://arxiv.org/abs/2407.02466.

    Args:
        actor_network (TensorDictModule): ``latent`` -> ``loc``, ``scale`` of a Gaussian before tanh, or a
            :class:`~torchrl.modules.ProbabilisticActor` around such a module; the loss trains its parameters.
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
        entropy_weight (float): weight of the policy's entropy, averaged over steps, relative to the scaled −mean(J).
            It affects the gradient but not the value of ``loss_actor``. The published PWM has no such term. Without it,
            actions with a large gradient may saturate, and pull actions without a gradient along. Defaults to ``0.0``.
        action_mask (Tensor, optional): ``[num_tasks, A]`` of 0 and 1, for multi-task models; needs ``task`` in the
            input. Defaults to ``None``.
        reduction (str): ``"mean"`` or ``"sum"`` over rollouts, or ``"none"``, which leaves ``loss_actor`` ``[B, 1]``.
            Defaults to ``"mean"``.
        delay_value (bool): compute values with target parameters, moved by a TorchRL target updater such as
            :class:`~torchrl.objectives.SoftUpdate`. Defaults to ``False``, the value network's own parameters.
        compile (bool): compile the evaluation of the dynamics network of a :class:`~pwm_torchrl.modules.WorldModel`,
            which is called at every step. Defaults to ``False``.
        precision (str): precision of matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``. Defaults to ``"fp32"``.

    The input holds ``latent`` ``[B, D]`` (and ``task`` ``[B]``). The output is a TensorDict with ``loss_actor`` and
    detached metrics; :meth:`rollout_and_loss` also returns the rollout, for the critics to learn from, and
    :meth:`backward` computes both one micro-batch at a time.

    .. note:: TorchRL's LossModule forces deterministic exploration inside ``forward``. This loss draws its noise
        explicitly, so it is not affected.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from pwm_torchrl.modules import *
        >>> from pwm_torchrl.objectives import PWMActorLoss
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
    default_value_estimator = ValueEstimators.TDLambda

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
        precision: str = "fp32",
    ) -> None:
        super().__init__(reduction, precision)
        if horizon < 1:
            raise ValueError(f"horizon={horizon} must be at least 1.")
        if entropy_weight < 0 or (entropy_weight and deterministic):
            raise ValueError(
                f"entropy_weight={entropy_weight} must not be negative, and 0 for a deterministic policy, which has "
                "no entropy."
            )
        actor_network = distribution_parameters(actor_network)
        self.convert_to_functional(actor_network, "actor_network")
        # If networks share layers, only the policy's copy is trained.
        self.__dict__["actor_network"] = apart(actor_network, world_model, value_network)
        # Not registered as submodules: this loss does not train their parameters (as in TorchRL's DreamerActorLoss).
        self.__dict__["world_model"] = world_model
        self.__dict__["value_network"] = value_network
        if delay_value:
            self.target_value_network_params = delayed(value_network, world_model)
            self._has_update_associated["value_network"] = False
        if compile:
            for part in world_model.modules():
                if isinstance(part, WorldModel):
                    part.compile_pieces()
        self.gamma, self.lmbda = gamma, lmbda
        self.horizon = horizon
        self.detach = detach
        self.normalize_returns = normalize_returns
        self.deterministic = deterministic
        self.entropy_weight = entropy_weight
        self.return_statistics = RunningStatistics()
        self.register_buffer("action_mask", action_mask)

    @property
    def value_network_params(self) -> TensorDictBase:
        """The value network's current parameters, which this loss does not train."""
        return TensorDict.from_module(self.value_network)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> PWMActorLoss:
        # They are not submodules, but must move to the same device and dtype as the loss.
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
        """Differentiable rollout, and V(z_1) .. V(z_H) ``[H, B, 1]``, of which only the last value has a graph.

        Args:
            start (Tensor): start latents ``[B, D]``.
            task (Tensor, optional): task index ``[B]``.
            noise (Tensor, optional): from :meth:`draw_noise`. Defaults to ``None``, drawn here.
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

        values = self.target_value_network_params  # detached, with and without delay_value
        with (
            products_in(self.products),
            frozen(self.world_model),
            swapped(values, self.value_network),
            swapped(self.actor_network_params, self.actor_network),
        ):
            rollout = imagine(
                cast("Step", lambda latent, action: model(latent, action, *tasks)),
                policy,
                start.detach(),
                self.horizon,
                noise,
                self.detach,
            )
            # Only the last value enters J; the others are for the targets and need no graph.
            with torch.no_grad():
                targets = value(rollout.latent[1:-1].detach())[0]
            return rollout, torch.cat([targets, value(rollout.latent[-1:])[0]])

    def returns(self, rollout: Imagined, next_value: Tensor) -> Tensor:
        """J ``[B, 1]`` of every rollout."""
        return rollout_return(rollout.reward, rollout.terminated, next_value[-1], self.gamma)

    def objective(self, rollout: Imagined, next_value: Tensor, bonus: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, J ``[B, 1]``); with return normalisation, updates the running variance with J first."""
        returns = self.returns(rollout, next_value)
        return self.reduced(-returns - bonus) / self.divisor(returns), returns

    def action_gradients(self, start: Tensor) -> list[Tensor]:
        """Gradients of mean(J) with respect to the actions ``[B, A]`` of every step, from latents ``[B, D]``."""
        rollout, next_value = self.imagine(start)
        return list(torch.autograd.grad(self.returns(rollout, next_value).mean(), rollout.actions))

    def entropy_bonus(self, rollout: Imagined, noise: Tensor | None, task: Tensor | None = None) -> Tensor | float:
        """A term to add to J ``[B, 1]``: its value is 0, its gradient is that of the weighted entropy.

        It is multiplied by H or the running standard deviation so far, because J is later divided by it. The gradient
        does not flow through the states.

        Args:
            rollout (Imagined): from :meth:`imagine`.
            noise (Tensor, optional): the rollout's noise ``[H, B, A]``.
            task (Tensor, optional): task index ``[B]``; padded action dimensions have no entropy.
        """
        if not self.entropy_weight or noise is None:
            return 0.0
        with products_in(self.products), swapped(self.actor_network_params, self.actor_network):
            loc, scale = self._policy_parameters()(rollout.latent[:-1].detach())
        entropy = squashed_entropy(loc, scale, noise)
        if task is not None and self.action_mask is not None:
            entropy = entropy * self.action_mask[task]
        alive = alive_before(rollout.terminated)[:-1]
        bonus = self.entropy_weight * self._scale() * (entropy.sum(-1, keepdim=True) * alive).mean(0)
        return bonus - bonus.detach()

    def _scale(self) -> Tensor | int:
        """The divisor of J, from the running variance as it is now."""
        if not self.normalize_returns:
            return self.horizon
        return torch.sqrt(self.return_statistics.var + RETURN_EPSILON).squeeze()

    def divisor(self, returns: Tensor) -> Tensor | int:
        """The divisor of −mean(J): H, or the running standard deviation after an update with J."""
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
        """The output of ``forward``, from returns J ``[B, 1]`` and a detached rollout ``[B, H]``."""
        keys = self.tensor_keys
        return TensorDict(
            loss_actor=loss,
            imagined_return=returns.detach().mean(),
            imagined_reward=imagined.get(("next", keys.reward)).mean(),
            return_std=returns.detach().std(unbiased=False),
            terminated=imagined.get(("next", keys.terminated)).any(1).float().mean(),
        )

    # Gradients, one micro-batch or share of a batch at a time ---------------------------------------------------------

    def reduced(self, each: Tensor) -> Tensor:
        """``each`` ``[B, 1]``, reduced according to ``reduction``."""
        if self.reduction == "none":
            return each
        return each.mean() if self.reduction == "mean" else each.sum()

    def backward(
        self, tensordict: TensorDictBase, micro_batch: int | None = None
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Add the gradients of the loss to the actor's parameters, one micro-batch of rollouts at a time.

        The result equals that of :meth:`rollout_and_loss` on the whole batch: noise is drawn for the whole batch, and
        the gradients are divided by the running standard deviation after all returns of the batch have entered it.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``, as :meth:`forward` takes them.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.

        Returns:
            tuple: the outputs of :meth:`rollout_and_loss`, detached.

        Raises:
            ConfigurationError: for ``reduction="none"``.
        """
        return self.finish(self.accumulate(tensordict, micro_batch))

    def accumulate(
        self,
        tensordict: TensorDictBase,
        micro_batch: int | None = None,
        noise: Tensor | None = None,
        count: int | None = None,
    ) -> Accumulated:
        """The first half of :meth:`backward`: sums over a share of a batch; changes no parameters or statistics.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``, the whole batch or a share of it.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.
            noise (Tensor, optional): noise of these rollouts, from :meth:`draw_noise`. Defaults to ``None``, drawn
                here.
            count (int, optional): rollouts of the whole batch. Defaults to ``None``, B.
        """
        self.check_back_propagates()
        start, task = self.start(tensordict)
        noise = self.draw_noise(start) if noise is None else noise
        count = len(start) if count is None else count
        divisor = count if self.reduction == "mean" else 1
        parameters = self._trained()
        total: Gradients | None = None
        returns, imagined = [], []
        for rows in micro_batches(len(start), micro_batch):
            tasks = None if task is None else task[rows]
            drawn = None if noise is None else noise[:, rows]
            rollout, next_value = self.imagine(start[rows], tasks, drawn)
            part = self.returns(rollout, next_value)
            objective = part + self.entropy_bonus(rollout, drawn, tasks)
            total = plus_gradients(total, -objective.sum() / divisor, parameters)
            returns.append(part.detach())
            imagined.append(self.detached(rollout, next_value))
            del rollout, next_value, part, objective  # frees their graph before the next part
        assert total is not None  # an empty batch also has one (empty) part
        return Accumulated(total, torch.cat(returns), imagined[0] if len(imagined) == 1 else torch.cat(imagined))

    def finish(self, whole: Accumulated) -> tuple[TensorDictBase, TensorDictBase]:
        """The second half of :meth:`backward`, from the sums over the whole batch; same return value."""
        divisor = self.divisor(whole.returns)
        hand_out(whole.gradients, self._trained(), divisor)
        loss = self.reduced(-whole.returns) / divisor
        return self.metrics(loss, whole.returns, whole.rollouts), whole.rollouts

    def _trained(self) -> list[Tensor]:
        return [p for p in self.actor_network_params.values(True, True) if p.requires_grad]

    # Value targets ----------------------------------------------------------------------------------------------------

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> PWMActorLoss:
        """Choose the estimator of the rollouts' value targets; J does not change.

        Args:
            value_type (ValueEstimators, ValueEstimatorBase or type): ``TD0``, ``TD1`` or ``TDLambda``, or a custom
                estimator. Defaults to ``None``, TD(λ).
            **hyperparams: arguments of the estimator; ``gamma`` and ``lmbda`` default to this loss's.
        """
        kind = self.default_value_estimator if value_type is None else value_type
        if isinstance(kind, (ValueEstimatorBase, type)):
            super().make_value_estimator(kind, **hyperparams)
        else:
            self._make_known(kind, hyperparams)
        # Not a submodule: the estimator may have a value network, which this loss must not train.
        self.__dict__["_value_estimator"] = self._modules.pop("_value_estimator")
        self._forward_value_estimator_keys()
        return self

    def _make_known(self, kind: ValueEstimators, hyperparams: dict[str, Any]) -> None:
        if kind == ValueEstimators.TDLambda:
            hyperparams.setdefault("lmbda", self.lmbda)
            hyperparams.setdefault("vectorized", False)  # TorchRL's vectorised form fails with λ = 0
        supported = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
        hyperparams.setdefault("device", self._default_device)
        dispatch_value_estimator(self, kind, supported=supported, value_network=None, **hyperparams)

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        keys = self.tensor_keys
        if self._value_estimator is not None:
            self._value_estimator.set_keys(
                value=keys.state_value, value_target=keys.value_target, reward=keys.reward, terminated=keys.terminated
            )

    def detached(self, rollout: Imagined, next_value: Tensor) -> TensorDictBase:
        """A rollout without its autograd graph, batch-major ``[B, H]``, with value targets."""
        if self._value_estimator is None:
            targets = td_lambda_targets(rollout.reward, next_value, rollout.terminated, self.gamma, self.lmbda)
        else:
            targets = estimated_targets(self._value_estimator, rollout, next_value, self.tensor_keys.latent)
        return detached_rollout(rollout, next_value, targets, self.tensor_keys)
