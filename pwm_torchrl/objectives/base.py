"""Shared by the losses: shape checks, micro-batches, the LossModule base class, and modules as functions of tensors.

A batch can be processed in parts with the same result, because everything that couples its rows is computed for the
whole batch: random numbers are drawn first, means divide by whole-batch counts, running statistics are updated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from pwm_torchrl.errors import ConfigurationError

# Shape checks: a loss raises where broadcasting would silently accept a wrong shape -----------------------------------


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the expected shape; ``None`` matches any size.

    Args:
        name (str): the tensor's name in the message.
        tensor (Tensor): the tensor to check.
        expected (tuple): size of each dimension.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(
            f"{name} has shape {list(shape)} but [{wanted}] is needed; values and rewards end in a dimension of size "
            "1, and nothing is broadcast."
        )


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors have the same shape."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} but {other_name} has shape {list(other.shape)}; "
            "they must be equal, nothing is broadcast."
        )


# Micro-batches, whose gradients add up to those of the whole batch ----------------------------------------------------


def micro_batches(count: int, size: int | None = None) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows; one slice of all rows if ``size`` is ``None``.

    Zero rows give one empty slice: a share of a batch may be empty, and its losses must still be computed, as zeros.

    Raises:
        ValueError: if ``size`` is below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"A micro-batch of {size} rows is too small; the smallest is 1.")
    step = count if size is None else min(size, count)
    return (slice(first, min(first + step, count)) for first in range(0, max(1, count), max(1, step)))


def backward_in_parts(
    count: int, size: int | None, losses: Callable[[slice], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Back-propagate a batch's losses one micro-batch at a time.

    Args:
        count (int): rows of the batch.
        size (int, optional): rows per backward pass; ``None``: all at once.
        losses (callable): rows -> the micro-batch's share of each loss; the shares must add up to the batch's loss.

    Returns:
        dict of Tensor: the batch's losses, detached. Gradients are added to the parameters' ``.grad``.
    """
    total: dict[str, Tensor] = {}
    for rows in micro_batches(count, size):
        parts = losses(rows)
        sum(parts.values()).backward()
        detached = {key: value.detach() for key, value in parts.items()}
        del parts  # frees its graph before the next micro-batch
        total = {key: total[key] + value for key, value in detached.items()} if total else detached
    return total


Gradients = list[Tensor | None]


def plus_gradients(total: Gradients | None, loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """``total`` plus the gradients of ``loss``; ``None`` for a parameter that no loss depends on."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if total is None:
        return list(gradients)
    # Not in place: autograd may return one tensor as the gradient of two parameters.
    return [b if a is None else a + b for a, b in zip(total, gradients, strict=True)]


def hand_out(gradients: Gradients, parameters: Sequence[Tensor], divisor: Tensor | float | None = None) -> None:
    """Add gradients, divided by ``divisor`` if it is given, to the parameters' ``.grad``."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient if divisor is None else gradient / divisor
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


# The base class of the losses -----------------------------------------------------------------------------------------


REDUCTIONS = ("none", "mean", "sum")
#: Precisions of matrix products, and the dtype that a layer rounds the factors to. With ``tf32`` the GPU rounds them,
#: by a process-wide setting; see :func:`pwm_torchrl.devices.set_precision`.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}


class PWMLoss(LossModule):
    """Base class of this package's losses: reduction, output keys, moves between devices, and initialisation.

    Args:
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``. Defaults to ``"mean"``.
        precision (str): precision of matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``; norms, softmaxes, losses,
            solver steps and parameter gradients are always float32. Defaults to ``"fp32"``.

    Raises:
        ConfigurationError: for an unknown reduction or precision.
    """

    def __init__(self, reduction: str = "mean", precision: str = "fp32") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ConfigurationError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}.")
        if precision not in PRECISIONS:
            raise ConfigurationError(f"training.precision={precision!r} is not one of {', '.join(PRECISIONS)}.")
        self.reduction = reduction
        self.products = PRECISIONS[precision]
        self._selected_keys: list[NestedKey] | None = None

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """Nothing to forward: there is no value estimator."""

    @property
    def written_keys(self) -> list[NestedKey]:
        """The keys of everything that ``forward`` computes."""
        raise NotImplementedError

    @property
    def out_keys(self) -> list[NestedKey]:
        """The keys that ``forward`` returns: :attr:`written_keys`, or those chosen by ``select_out_keys``."""
        return self.written_keys if self._selected_keys is None else self._selected_keys

    @out_keys.setter
    def out_keys(self, keys: list[NestedKey]) -> None:
        self._selected_keys = None if list(keys) == self.written_keys else list(keys)

    def check_back_propagates(self) -> None:
        """Raise :class:`ConfigurationError` if the reduction leaves no scalar to back-propagate from."""
        if self.reduction == "none":
            raise ConfigurationError("reduction='none' leaves no scalar for backward; use mean or sum.")

    def reset_parameters_recursive(self) -> None:
        """Re-initialise the trained parameters and their targets; networks that the loss only reads do not change."""
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
        """The networks that this loss trains."""
        names = [name.removesuffix("_params") for name in self._modules if name.endswith("_params")]
        return [(name, getattr(self, name)) for name in names if not name.startswith("target_")]

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> PWMLoss:
        super()._apply(fn)
        # Moving replaced the tensors in the loss's own collections; the networks must use the same ones.
        for name, network in self._own_networks():
            getattr(self, f"{name}_params").to_module(network, return_swap=False)
        return self


# Modules as functions of tensors, with chosen parameters: swapped, frozen, delayed ------------------------------------


@contextmanager
def swapped(tensors: TensorDictBase, module: nn.Module) -> Iterator[None]:
    """Within the context, ``module`` computes with ``tensors``; its own are restored afterwards, also after an error.

    The context of :meth:`~tensordict.TensorDictBase.to_module` does not restore them after an error: a network that ran
    out of memory inside would continue without its own parameters.
    """
    # Preserving the module's state would create new Parameters, which collect gradients and break a compiled graph.
    context = tensors.to_module(module, preserve_module_state=False)
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within the context, the modules' parameters are detached: gradients flow through the modules, not into them.

    Unlike switching ``requires_grad`` off and on, this does not unfreeze partly frozen modules.
    """
    if not modules:
        yield
        return
    first, *rest = modules
    with swapped(TensorDict.from_module(first).data, first), frozen(*rest):
        yield


def tensor_function(
    module: TensorDictModuleBase, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of tensors that a TensorDictModule wraps.

    If it is a plain :class:`~tensordict.nn.TensorDictModule` with exactly these keys, its ``module`` is called
    directly; any other module is called with a TensorDict.

    Args:
        module (TensorDictModuleBase): reads ``in_keys`` and writes ``out_keys``.
        in_keys (sequence of NestedKey): keys of the function's arguments, in order.
        out_keys (sequence of NestedKey): keys of its results, in order.

    Raises:
        ValueError: if the module reads other keys, or does not write these.
    """
    wanted_in, wanted_out = ([unravel_key(k) for k in keys] for keys in (in_keys, out_keys))
    has_in, has_out = ([unravel_key(k) for k in keys] for keys in (module.in_keys, module.out_keys))
    if not set(has_in) <= set(wanted_in) or not set(wanted_out) <= set(has_out):
        raise ValueError(
            f"{type(module).__name__} reads {has_in} and writes {has_out}, but it may read only {wanted_in} and must "
            f"write {wanted_out}; give it those keys, or set the loss's keys to its own with set_keys."
        )
    if type(module) is TensorDictModule and (has_in, has_out) == (wanted_in, wanted_out):
        single = len(wanted_out) == 1

        def direct(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = module.module(*tensors)
            return (out,) if single else tuple(out)

        return direct

    def through_tensordict(*tensors: Tensor) -> tuple[Tensor, ...]:
        # All dimensions of the state but the last are batch dimensions.
        data = TensorDict({}, batch_size=tensors[0].shape[:-1])
        for key, tensor in zip(wanted_in, tensors, strict=True):
            data.set(key, tensor)
        data = module(data)
        return tuple(data.get(key) for key in wanted_out)

    return through_tensordict


def distribution_parameters(actor: TensorDictModuleBase) -> TensorDictModuleBase:
    """The part of a probabilistic actor that computes its distribution's parameters; other modules unchanged."""
    if isinstance(actor, ProbabilisticTensorDictSequential):
        parts = list(actor)[:-1]
        return parts[0] if len(parts) == 1 else TensorDictSequential(*parts)
    return actor


def shares_parameters(module: nn.Module, *others: nn.Module) -> bool:
    """Whether ``module`` shares a parameter with one of ``others``."""
    theirs = {id(p) for other in others for p in other.parameters()}
    return any(id(p) in theirs for p in module.parameters())


def apart(module: nn.Module, *others: nn.Module) -> nn.Module:
    """``module``, or a copy of it if it shares parameters with ``others``.

    A loss swaps tensors in and out of its networks; a layer shared by two networks cannot hold the tensors of both.
    """
    return deepcopy(module) if shares_parameters(module, *others) else module


def delayed(module: nn.Module, *others: nn.Module) -> TensorDictParams:
    """Target parameters: buffers that start as copies of the module's parameters, for a target updater to move.

    Raises:
        ConfigurationError: if the module shares parameters with ``others``, which would then be delayed, too.
    """
    if shares_parameters(module, *others):
        raise ConfigurationError(
            f"delay_value=True needs a value network of its own, but this {type(module).__name__} shares parameters "
            "with the world model; use separate networks, or delay_value=False."
        )
    return TensorDictParams(TensorDict.from_module(module).data.clone(), no_convert=True)
