"""Critic loss: regression of the ensemble's values on their targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from pwm_torchrl.modules import CriticEnsemble
from pwm_torchrl.modules.numerics import products_in
from pwm_torchrl.objectives.base import PWMLoss, backward_in_parts, check_same_shape, check_shape, swapped


def ensemble_value_loss(values: Tensor, target: Tensor) -> Tensor:
    """(V_k(z) − target)² ``[K, ..., 1]`` of every member; no gradient flows into the target.

    Args:
        values (Tensor): ``[K, ..., 1]``.
        target (Tensor): ``[..., 1]``.

    Raises:
        ValueError: unless each member's values have exactly the target's shape.
    """
    check_shape("value target", target, (*(None,) * (target.ndim - 1), 1))
    check_same_shape("value of an ensemble member", values[0], "value target", target)
    return (values - target.detach().unsqueeze(0)).square()


class PWMValueLoss(PWMLoss):
    r"""Regression of an ensemble of critics on their targets, mean over K members and all states:

    .. math::

        L = \operatorname{mean}_s \frac{1}{K} \sum_k \big( V_k(z_s) - \hat V_s \big)^2

    Critics that take actions are Q_k(z, a) instead of V_k(z). If the critics have a unit, the errors are divided by it.

    Args:
        critics (CriticEnsemble): the value functions; the loss trains their parameters.

    Keyword Args:
        reduction (str): ``"mean"`` or ``"sum"`` over states, or ``"none"``, which leaves ``[*batch, 1]``; each is
            averaged over members. Defaults to ``"mean"``.
        deactivate_vmap (bool): evaluate the members one after another instead of in batched products. Defaults to
            ``False``.
        precision (str): precision of matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``. Defaults to ``"fp32"``.

    The input holds ``latent`` ``[*batch, D]`` and ``value_target`` ``[*batch, 1]``, as
    :class:`~pwm_torchrl.objectives.PWMActorLoss` writes them, and ``action`` for critics that take actions. The output
    holds ``loss_value`` and the detached mean ``value``.

    .. note:: States after the end of an imagined rollout are excluded by the mask under
        :attr:`~torchrl.objectives.LossModule.loss_mask_key`, by default ``("collector", "mask")``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from pwm_torchrl.modules import CriticEnsemble
        >>> from pwm_torchrl.objectives import PWMValueLoss
        >>> loss = PWMValueLoss(CriticEnsemble(16, [32]))
        >>> data = TensorDict(latent=torch.rand(9, 16), value_target=torch.rand(9, 1), batch_size=[9])
        >>> loss(data)["loss_value"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys:
        """Configurable keys.

        Attributes:
            latent (NestedKey): latent state. Defaults to ``"latent"``.
            action (NestedKey): action, for critics that take actions. Defaults to ``"action"``.
            value_target (NestedKey): regression target. Defaults to ``"value_target"``.
        """

        latent: NestedKey = "latent"
        action: NestedKey = "action"
        value_target: NestedKey = "value_target"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    critics: CriticEnsemble
    critics_params: TensorDictParams
    target_critics_params: TensorDictParams

    def __init__(
        self,
        critics: CriticEnsemble,
        *,
        reduction: str = "mean",
        deactivate_vmap: bool = False,
        precision: str = "fp32",
    ) -> None:
        super().__init__(reduction, precision)
        self.convert_to_functional(critics, "critics")
        self.deactivate_vmap = deactivate_vmap

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        return [keys.latent, *([keys.action] if self.critics.action_dim else []), keys.value_target]

    @property
    def written_keys(self) -> list[NestedKey]:
        return ["loss_value", "value"]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses of latents ``[*batch, D]``."""
        error, values = self._errors(tensordict)
        loss = self._reduce_loss(error, tensordict)
        return TensorDict(loss_value=loss, value=values.detach().mean())

    def _errors(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Squared error ``[*batch, 1]``, averaged over members, and values ``[K, *batch, 1]``."""
        keys, scale = self.tensor_keys, self.critics.scale
        inputs = [tensordict[key].detach() for key in self.in_keys[:-1]]
        with products_in(self.products), swapped(self.critics_params, self.critics):
            evaluate = self.critics.one_by_one if self.deactivate_vmap else self.critics
            values = evaluate(*inputs)
        error = ensemble_value_loss(values, tensordict[keys.value_target]).mean(0)
        return error if scale is None else error / scale.square(), values

    def counted(self, tensordict: TensorDictBase) -> Tensor:
        """Number of unmasked states, at least 1: the divisor of their summed errors."""
        ones = torch.ones_like(tensordict[self.tensor_keys.value_target])
        return self._reduce_loss(ones, tensordict, reduction="sum").clamp_min(1)

    def backward(
        self,
        tensordict: TensorDictBase,
        micro_batch: int | None = None,
        *,
        whole: tuple[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch's loss to the parameters, one micro-batch at a time.

        Args:
            tensordict (TensorDictBase): states ``[S]``, as :meth:`forward` takes them; the whole batch or a share.
            micro_batch (int, optional): states per backward pass. Defaults to ``None``, all at once.

        Keyword Args:
            whole (tuple, optional): number of states and :meth:`counted` of the whole batch, if ``tensordict`` is a
                share of it; then the shares' gradients and losses add up to the batch's. Defaults to ``None``.

        Returns:
            dict of Tensor: ``loss_value`` and ``value``, detached.

        Raises:
            ConfigurationError: for ``reduction="none"``.
        """
        self.check_back_propagates()
        count, counted = (len(tensordict), self.counted(tensordict)) if whole is None else whole
        values = []

        def loss(rows: slice) -> dict[str, Tensor]:
            part = tensordict[rows]
            error, value = self._errors(part)
            values.append(value.detach().sum())
            total = self._reduce_loss(error, part, reduction="sum")
            return {"loss_value": total / counted if self.reduction == "mean" else total}

        losses = backward_in_parts(len(tensordict), micro_batch, loss)
        return {**losses, "value": torch.stack(values).sum() / (count * self.critics.num_critics)}
