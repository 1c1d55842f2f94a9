"""Maximum-entropy actor loss: first-order gradients through a few imagined steps and the value of the last action.

Covers everything from start latents to gradients, as :mod:`~pwm_torchrl.objectives.actor_loss` does for the published
PWM's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn.functional import softplus

from pwm_torchrl.modules import Actor, CriticEnsemble, WorldModel
from pwm_torchrl.modules.numerics import products_in
from pwm_torchrl.objectives.actor_loss import Accumulated
from pwm_torchrl.objectives.base import (
    Gradients,
    PWMLoss,
    check_shape,
    frozen,
    hand_out,
    micro_batches,
    plus_gradients,
    swapped,
)

#: Above this absolute value of an action, tanh has almost no gradient.
SATURATED = 0.97
#: In the metrics, a rollout counts as terminated if its probability of continuing is below this.
ENDED = 0.5


def squashed_log_prob(u: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Log π(tanh(u)) ``[..., 1]`` for u = mean + std · noise, summed over action dimensions.

    From https://arxiv.org/abs/1812.05905, appendix C.

    Args:
        u (Tensor): before tanh ``[..., A]``.
        std (Tensor): ``[..., A]``.
        noise (Tensor): standard normal ``[..., A]``.
    """
    gaussian = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(u)^2) itself is -inf in float32 from |u| = 9 on.
    squash = 2 * (math.log(2) - u - softplus(-2 * u))
    return (gaussian - squash).sum(-1, keepdim=True)


class SoftRollout(NamedTuple):
    """Rollouts of H steps and one more action; everything but ``actions`` is ``[B, 1]``."""

    actions: tuple[Tensor, ...]  # H + 1 times [B, A]; not stacked, so that each step's gradient can be taken
    objective: Tensor  # J
    reward: Tensor  # mean over the H steps; 0 if H = 0
    value: Tensor  # of the last action
    entropy: Tensor  # mean over the H + 1 actions
    alive: Tensor  # probability that the rollout continues after H steps


def soft_rollout(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    policy: Callable[[Tensor], tuple[Tensor, Tensor]],
    value: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    noise: Tensor,
    gamma: float,
    weight: Tensor,
    detach: bool = True,
) -> SoftRollout:
    """J = Σ_{t<H} γ^t c_t (r_t + w h_t) + γ^H c_H (Q(z_H, a_H) + w h_H).

    The entropies are h_t = −log π(a_t | z_t), the probabilities of continuing c_t = ∏_{s<t}(1 − p_s).

    Args:
        step (callable): latent, action -> next latent, reward, termination probability.
        policy (callable): latent -> mean and standard deviation before tanh.
        value (callable): latent, action -> value ``[B, 1]``.
        start (Tensor): z_0 ``[B, D]``.
        noise (Tensor): standard normal ``[H + 1, B, A]``.
        gamma (float): discount.
        weight (Tensor): w, the entropy's weight, in units of the rewards.
        detach (bool): stop the gradient at the policy's input. Defaults to ``True``.
    """
    horizon = len(noise) - 1
    z, alive = start, torch.ones_like(start[:, :1])
    objective, rewards, entropies = torch.zeros_like(alive), torch.zeros_like(alive), torch.zeros_like(alive)
    actions = []
    final = objective
    for t in range(horizon + 1):
        mean, std = policy(z.detach() if detach else z)
        u = mean + std * noise[t]
        action, entropy = torch.tanh(u), -squashed_log_prob(u, std, noise[t])
        actions.append(action)
        entropies = entropies + entropy.detach()
        if t == horizon:
            final = value(z, action)
            objective = objective + gamma**t * alive * (final + weight * entropy)
            break
        z, reward, ended = step(z, action)
        objective = objective + gamma**t * alive * (reward + weight * entropy)
        rewards = rewards + reward.detach()
        alive = alive * (1 - ended.to(reward.dtype))
    return SoftRollout(
        tuple(actions), objective, rewards / max(1, horizon), final.detach(), entropies / (horizon + 1), alive
    )


class SoftActorLoss(PWMLoss):
    r"""Negative soft return of a few imagined steps plus a final value, differentiated through model and critics.

    .. math::

        J = \sum_{t<H} \gamma^t c_t (\hat r_t + \alpha u\, h_t)
        + \gamma^H c_H \big( \min_k Q_k(z_H, a_H) + \alpha u\, h_H \big), \qquad
        L = -\frac{\operatorname{mean}(J)}{u (H + 1)}

    where :math:`h_t = -\log \pi(a_t \mid z_t)` is the entropy, :math:`c_t = \prod_{s<t} (1 - p_s)` the probability that
    the rollout continues to step t, and u the critics' unit. H = 0 gives SAC in latent space
    (https://arxiv.org/abs/1801.01290), H = 16 nearly PWM (https://arxiv.org/abs/2407.02466); SAC-SVG
    (https://arxiv.org/abs/2008.12775) lies between them. The weight α is learned so that the entropy is
    ``target_entropy`` per action dimension (https://arxiv.org/abs/1812.05905).

    Args:
        actor (Actor): with a temperature; the loss trains its parameters.
        world_model (WorldModel): single-task, or bound to one task; gets no gradient.
        critics (CriticEnsemble): critics that take actions, ``action_dim`` > 0; get no gradient.

    Keyword Args:
        horizon (int): H, 0 or more. Defaults to ``3``.
        gamma (float): discount. Defaults to ``0.99``.
        detach (bool): stop the gradient at the actor's input. Defaults to ``True``.
        target_entropy (float): target per action dimension. Defaults to ``-1.0``.
        reduction (str): ``"mean"`` or ``"sum"`` over rollouts, or ``"none"``, which leaves ``loss_actor`` ``[B, 1]``.
            Defaults to ``"mean"``.
        compile (bool): compile the evaluation of the dynamics network, which is called at every step. Defaults to
            ``False``.
        precision (str): precision of matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``. Defaults to ``"fp32"``.

    The input holds ``latent`` ``[B, D]``; the output is a TensorDict with ``loss_actor`` and detached metrics.

    Raises:
        ValueError: for a negative horizon, an actor without temperature, or critics that take no actions.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from pwm_torchrl.modules import *
        >>> from pwm_torchrl.objectives import SoftActorLoss
        >>> model = make_world_model(WorldModelSpec(3, 1, 16, [32], [32]))
        >>> actor = Actor(16, 1, [32], state_std=True, temperature=0.1)
        >>> loss = SoftActorLoss(actor, model, CriticEnsemble(16, [32], action_dim=1))
        >>> start = TensorDict(latent=model.encode(torch.randn(8, 3)).detach(), batch_size=[8])
        >>> loss(start)["loss_actor"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys:
        """Configurable keys.

        Attributes:
            latent (NestedKey): start latents. Defaults to ``"latent"``.
        """

        latent: NestedKey = "latent"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    actor: Actor
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams

    #: J is divided by the critics' unit, which is computed from collected rewards, not by statistics of J.
    return_statistics = None

    def __init__(
        self,
        actor: Actor,
        world_model: WorldModel,
        critics: CriticEnsemble,
        *,
        horizon: int = 3,
        gamma: float = 0.99,
        detach: bool = True,
        target_entropy: float = -1.0,
        reduction: str = "mean",
        compile: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__(reduction, precision)
        if horizon < 0:
            raise ValueError(f"horizon={horizon} must not be negative.")
        if actor.log_temperature is None or not critics.action_dim:
            raise ValueError(
                "SoftActorLoss needs an Actor with a temperature and a CriticEnsemble with action_dim > 0, not "
                f"temperature={actor.initial_temperature} and action_dim={critics.action_dim}."
            )
        self.convert_to_functional(actor, "actor")
        # Not registered as submodules: this loss does not train their parameters.
        self.__dict__["world_model"] = world_model
        self.__dict__["critics"] = critics
        if compile:
            world_model.compile_pieces()
        self.horizon, self.gamma, self.detach = horizon, gamma, detach
        self.target_entropy = target_entropy * actor.action_dim

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> SoftActorLoss:
        # They are not submodules, but must move to the same device and dtype as the loss.
        for network in (self.world_model, self.critics):
            network._apply(fn)
        super()._apply(fn)
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.latent]

    @property
    def written_keys(self) -> list[NestedKey]:
        names = ["imagined_return", "imagined_reward", "value", "entropy", "temperature", "terminated", "saturated"]
        return ["loss_actor", *names]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Loss and metrics of rollouts from latents ``[B, D]``; ``loss_actor`` excludes the temperature's own loss."""
        start = self.start(tensordict)
        rollout = self.imagine(start, self.draw_noise(start))
        return self.metrics(rollout.objective, self._rows(rollout))

    def start(self, tensordict: TensorDictBase) -> Tensor:
        """Start latents ``[B, D]``."""
        latent = tensordict[self.tensor_keys.latent]
        check_shape("latent", latent, (None, None))
        return latent

    def draw_noise(self, latent: Tensor) -> Tensor:
        """Standard normal action noise ``[H + 1, B, A]`` for start latents ``[B, D]``."""
        shape = self.horizon + 1, latent.shape[0], self.actor.action_dim
        return torch.randn(*shape, dtype=latent.dtype, device=latent.device)

    def imagine(self, start: Tensor, noise: Tensor) -> SoftRollout:
        """Differentiable rollouts from start latents ``[B, D]``, with noise from :meth:`draw_noise`."""
        with products_in(self.products), frozen(self.world_model, self.critics), swapped(self.actor_params, self.actor):
            temperature = self.actor.temperature
            assert temperature is not None
            weight = temperature.detach() * self.unit
            return soft_rollout(
                self.world_model.soft_step,
                self.actor,
                self.critics.value,
                start.detach(),
                noise,
                self.gamma,
                weight,
                self.detach,
            )

    @property
    def unit(self) -> Tensor | float:
        """u, the unit in which the critics compute; 1 without one."""
        return 1.0 if self.critics.scale is None else self.critics.scale

    @property
    def divisor(self) -> Tensor | float:
        """The divisor of −J: u (H + 1)."""
        return self.unit * (self.horizon + 1)

    def action_gradients(self, start: Tensor) -> list[Tensor]:
        """Gradients of mean(J) with respect to the actions ``[B, A]`` of every step, from latents ``[B, D]``."""
        rollout = self.imagine(start, self.draw_noise(start))
        return list(torch.autograd.grad(rollout.objective.mean(), rollout.actions))

    def metrics(self, objective: Tensor, rows: TensorDictBase) -> TensorDictBase:
        """The output of ``forward``, from J ``[B, 1]`` and a detached summary of the rollouts ``[B]``."""
        loss = -objective / self.divisor
        loss = loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()
        temperature = self.actor.temperature
        assert temperature is not None
        values = {
            "imagined_return": objective.detach().mean(),
            "imagined_reward": rows["reward"].mean(),
            "value": rows["value"].mean(),
            "entropy": rows["entropy"].mean() / self.actor.action_dim,
            "temperature": temperature.detach(),
            "terminated": (rows["alive"] < ENDED).float().mean(),
            "saturated": rows["saturated"].mean(),
        }
        return TensorDict({"loss_actor": loss, **values}, [])

    @staticmethod
    def _rows(rollout: SoftRollout) -> TensorDictBase:
        saturated = torch.stack(
            [(a.detach().abs() > SATURATED).float().mean(-1, keepdim=True) for a in rollout.actions]
        )
        entries = {"reward": rollout.reward, "value": rollout.value, "entropy": rollout.entropy, "alive": rollout.alive}
        rows = {key: value.detach() for key, value in entries.items()}
        return TensorDict({**rows, "saturated": saturated.mean(0)}, rollout.objective.shape[:1])

    # Gradients, one micro-batch or share of a batch at a time ---------------------------------------------------------

    def backward(
        self, tensordict: TensorDictBase, micro_batch: int | None = None
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Add the gradients of the loss and of the temperature's loss to the actor's parameters.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.

        Returns:
            tuple: losses and metrics, and a summary of the rollouts ``[B]``, detached.

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
        """The first half of :meth:`backward`: sums over a share of a batch; changes no parameters.

        Args:
            tensordict (TensorDictBase): start latents ``[B]``, the whole batch or a share of it.
            micro_batch (int, optional): rollouts per backward pass. Defaults to ``None``, all at once.
            noise (Tensor, optional): noise of these rollouts, from :meth:`draw_noise`. Defaults to ``None``, drawn
                here.
            count (int, optional): rollouts of the whole batch. Defaults to ``None``, B.
        """
        self.check_back_propagates()
        start = self.start(tensordict)
        noise = self.draw_noise(start) if noise is None else noise
        count = len(start) if count is None else count
        divisor = self.divisor * (count if self.reduction == "mean" else 1)
        parameters = self._trained()
        log_temperature = self.actor_params["log_temperature"]
        total: Gradients | None = None
        objectives, summaries = [], []
        for rows in micro_batches(len(start), micro_batch):
            rollout = self.imagine(start[rows], noise[:, rows])
            surplus = (rollout.entropy.detach() - self.target_entropy).sum() / (
                count if self.reduction == "mean" else 1
            )
            loss = -(rollout.objective / divisor).sum() + log_temperature * surplus
            total = plus_gradients(total, loss, parameters)
            objectives.append(rollout.objective.detach())
            summaries.append(self._rows(rollout))
            del rollout, loss  # frees their graph before the next part
        assert total is not None  # an empty batch also has one (empty) part
        return Accumulated(total, torch.cat(objectives), torch.cat(summaries))

    def finish(self, whole: Accumulated) -> tuple[TensorDictBase, TensorDictBase]:
        """The second half of :meth:`backward`, from the sums over the whole batch; same return value."""
        hand_out(whole.gradients, self._trained())
        return self.metrics(whole.returns, whole.rollouts), whole.rollouts

    def _trained(self) -> list[Tensor]:
        return [p for p in self.actor_params.values(True, True) if p.requires_grad]
