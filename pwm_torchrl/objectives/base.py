"""What the losses share as TorchRL LossModules."""

from __future__ import annotations

from collections.abc import Callable

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from pwm_torchrl.errors import ConfigurationError

REDUCTIONS = ("none", "mean", "sum")


class PWMLoss(LossModule):
    """Reduction, output keys, moves and initialisation, the same for every loss of this package.

    Args:
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ConfigurationError: for another reduction.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ConfigurationError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        self.reduction = reduction
        self._selected_keys: list[NestedKey] | None = None

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """No value estimator."""

    @property
    def written_keys(self) -> list[NestedKey]:
        """Everything that ``forward`` computes."""
        raise NotImplementedError

    @property
    def out_keys(self) -> list[NestedKey]:
        """What ``forward`` returns: all of :attr:`written_keys`, or those of ``select_out_keys``."""
        return self.written_keys if self._selected_keys is None else self._selected_keys

    @out_keys.setter
    def out_keys(self, keys: list[NestedKey]) -> None:
        self._selected_keys = None if list(keys) == self.written_keys else list(keys)

    def check_back_propagates(self) -> None:
        """Raise :class:`ConfigurationError` if the loss is no scalar to back-propagate from."""
        if self.reduction == "none":
            raise ConfigurationError("reduction='none' leaves no scalar for backward; accepted there are mean and sum.")

    def reset_parameters_recursive(self) -> None:
        """Initialise the parameters of this loss anew, targets alike; networks that it only reads stay as they are."""
        for name, network in self._own_networks():
            if isinstance(network, TensorDictModuleBase):
                network.reset_parameters_recursive()
            else:
                network.reset_parameters()
            self._copy_to_target(name)

    def _copy_to_target(self, name: str) -> None:
        target = self._modules.get(f"target_{name}_params")
        if target is not None:
            target.data.update_(getattr(self, f"{name}_params").data)

    def _own_networks(self) -> list[tuple[str, nn.Module]]:
        """The networks whose parameters are this loss's."""
        names = [name.removesuffix("_params") for name in self._modules if name.endswith("_params")]
        return [(name, getattr(self, name)) for name in names if not name.startswith("target_")]

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> PWMLoss:
        super()._apply(fn)
        # The moved tensors are in the loss's own collections; the networks are to have the same ones.
        for name, network in self._own_networks():
            getattr(self, f"{name}_params").to_module(network, return_swap=False)
        return self
