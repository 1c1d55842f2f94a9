"""Imagined rollouts as critics read them: detached, batch-major, with value targets."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from pwm_torchrl.objectives.base import PWMLoss
from pwm_torchrl.objectives.imagination import Imagined, alive_before, td_lambda_targets


class RolloutKeys(Protocol):
    """Names of a rollout's entries, such as the accepted keys of :class:`~pwm_torchrl.objectives.PWMActorLoss`."""

    latent: NestedKey
    action: NestedKey
    reward: NestedKey
    terminated: NestedKey
    state_value: NestedKey
    value_target: NestedKey


def detached_rollout(rollout: Imagined, next_value: Tensor, targets: Tensor, keys: RolloutKeys) -> TensorDictBase:
    """A rollout without its graph, batch-major ``[B, H]``.

    Args:
        rollout (Imagined): time-major.
        next_value (Tensor): V(z_1) .. V(z_H) ``[H, B, 1]``.
        targets (Tensor): value targets of z_0 .. z_{H-1} ``[H, B, 1]``.
        keys (RolloutKeys): names of the entries.
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


class ImaginedTargets(PWMLoss):
    """A loss that imagines rollouts and writes value targets into them.

    Args:
        gamma (float): discount.
        lmbda (float): λ.
        reduction (str): see :class:`~pwm_torchrl.objectives.base.PWMLoss`.
    """

    default_value_estimator = ValueEstimators.TDLambda

    def __init__(self, gamma: float, lmbda: float, reduction: str) -> None:
        super().__init__(reduction)
        self.gamma = gamma
        self.lmbda = lmbda

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> ImaginedTargets:
        """Choose how the value targets of rollouts are estimated; J stays what it is.

        Args:
            value_type (ValueEstimators, ValueEstimatorBase or type): ``TD0``, ``TD1`` or ``TDLambda``, or an estimator
                of your own. Defaults to ``None``, TD(λ).
            **hyperparams: of the estimator; ``gamma`` and ``lmbda`` default to this loss's.
        """
        kind = self.default_value_estimator if value_type is None else value_type
        if isinstance(kind, (ValueEstimatorBase, type)):
            super().make_value_estimator(kind, **hyperparams)
        else:
            self._make_known(kind, hyperparams)
        # No submodule: an estimator may have a value network, whose parameters are not this loss's.
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
        """A rollout without its graph, batch-major ``[B, H]``, with value targets."""
        if self._value_estimator is None:
            targets = td_lambda_targets(rollout.reward, next_value, rollout.terminated, self.gamma, self.lmbda)
        else:
            targets = estimated_targets(self._value_estimator, rollout, next_value, self.tensor_keys.latent)
        return detached_rollout(rollout, next_value, targets, self.tensor_keys)


@torch.no_grad()
def estimated_targets(
    estimator: ValueEstimatorBase, rollout: Imagined, next_value: Tensor, latent: NestedKey
) -> Tensor:
    """Value targets ``[H, B, 1]`` of one of TorchRL's estimators.

    An estimator that has a value network evaluates the rollout's latents, under ``latent``, by itself.
    """
    keys = estimator.tensor_keys
    if not rollout.reward.numel():  # a share of a batch may be empty, and TorchRL's estimates cannot
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
