"""What the losses share: exact shapes; batches in parts; TorchRL's LossModule; modules as functions of tensors.

What couples the members of a batch is settled for the whole batch beforehand or afterwards: random numbers are drawn
first, means divide by counts of the whole batch, running statistics are updated once with all of it.
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

# Shape checks: a loss refuses what broadcasting would silently accept -------------------------------------------------


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the expected shape; ``None`` matches any size.

    Args:
        name (str): what the tensor is, for the message.
        tensor (Tensor): what to check.
        expected (tuple): size per dimension.
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


# Updates split into micro-batches: gradients accumulate to those of the whole batch -----------------------------------


def micro_batches(count: int, size: int | None = None) -> Iterator[slice]:
    """Consecutive rows of at most ``size``; one slice of all of them if ``size`` is ``None``.

    No rows are one empty slice: a share of a batch may be empty, and its losses are then zeros like any other's.

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
        losses (callable): rows -> the micro-batch's share of each loss, so that the shares add up to the batch's loss.

    Returns:
        dict of Tensor: the batch's losses, detached. The gradients are added to the parameters' ``.grad``.
    """
    total: dict[str, Tensor] = {}
    for rows in micro_batches(count, size):
        parts = losses(rows)
        sum(parts.values()).backward()
        detached = {key: value.detach() for key, value in parts.items()}
        del parts  # or its graph would live beside the next micro-batch's
        total = {key: total[key] + value for key, value in detached.items()} if total else detached
    return total


Gradients = list[Tensor | None]


def plus_gradients(total: Gradients | None, loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """The gradients of the parts so far and of one more; ``None`` where no part reads a parameter."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if total is None:
        return list(gradients)
    # Not in place: autograd may hand out one tensor as the gradient of two parameters.
    return [b if a is None else a + b for a, b in zip(total, gradients, strict=True)]


def hand_out(gradients: Gradients, parameters: Sequence[Tensor], divisor: Tensor | float | None = None) -> None:
    """Add gradients, divided if there is a divisor, to the parameters' own."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient if divisor is None else gradient / divisor
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


# What the losses share as TorchRL LossModules -------------------------------------------------------------------------


REDUCTIONS = ("none", "mean", "sum")
#: Precisions of matrix products and the dtype to which a layer rounds their factors. With ``tf32`` that is the GPU's
#: affair: it is a setting of the process, see :func:`pwm_torchrl.devices.set_precision`.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}


class PWMLoss(LossModule):
    """Reduction, output keys, moves and initialisation, the same for every loss of this package.

    Args:
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``.
        precision (str): of matrix products, ``"fp32"``, ``"tf32"`` or ``"bf16"``; norms, softmaxes, losses, solver
            steps and gradients of parameters are float32 with each. Defaults to ``"fp32"``.

    Raises:
        ConfigurationError: for another reduction or precision.
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


# Modules as functions of tensors, with parameters of someone's choice: frozen, swapped, delayed -----------------------


@contextmanager
def swapped(tensors: TensorDictBase, module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` computes with ``tensors``; afterwards with its own again, after an error, too.

    The context that :meth:`~tensordict.TensorDictBase.to_module` returns leaves the tensors in place when an error
    ends it: after running out of memory in it, a network would go on without its parameters.
    """
    # Kept as parameters they would be made anew, take gradients, and break a compiled graph.
    context = tensors.to_module(module, preserve_module_state=False)
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, the modules' parameters are detached views: gradients flow through them, not into them.

    Unlike switching ``requires_grad``, this leaves partly frozen modules as they were.
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

    A plain :class:`~tensordict.nn.TensorDictModule` with exactly these keys is called through its ``module``, without a
    TensorDict in between; anything else goes through one.

    Args:
        module (TensorDictModuleBase): reads ``in_keys`` and writes ``out_keys``.
        in_keys (sequence of NestedKey): order of the function's arguments.
        out_keys (sequence of NestedKey): order of its results.

    Raises:
        ValueError: if the module does not read and write these keys.
    """
    wanted_in, wanted_out = ([unravel_key(k) for k in keys] for keys in (in_keys, out_keys))
    has_in, has_out = ([unravel_key(k) for k in keys] for keys in (module.in_keys, module.out_keys))
    if not set(has_in) <= set(wanted_in) or not set(wanted_out) <= set(has_out):
        raise ValueError(
            f"{type(module).__name__} reads {has_in} and writes {has_out}, but reading no more than {wanted_in} and "
            f"writing at least {wanted_out} is needed; give it those keys, or tell the loss its own by set_keys."
        )
    if type(module) is TensorDictModule and (has_in, has_out) == (wanted_in, wanted_out):
        single = len(wanted_out) == 1

        def direct(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = module.module(*tensors)
            return (out,) if single else tuple(out)

        return direct

    def through_tensordict(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The state, last to be given a batch shape, has features last: everything before them is batch.
        data = TensorDict({}, batch_size=tensors[0].shape[:-1])
        for key, tensor in zip(wanted_in, tensors, strict=True):
            data.set(key, tensor)
        data = module(data)
        return tuple(data.get(key) for key in wanted_out)

    return through_tensordict


def distribution_parameters(actor: TensorDictModuleBase) -> TensorDictModuleBase:
    """The part of a probabilistic actor that computes its distribution's parameters; other modules as they are."""
    if isinstance(actor, ProbabilisticTensorDictSequential):
        parts = list(actor)[:-1]
        return parts[0] if len(parts) == 1 else TensorDictSequential(*parts)
    return actor


def shares_parameters(module: nn.Module, *others: nn.Module) -> bool:
    """Whether a parameter of ``module`` is one of the others', too."""
    theirs = {id(p) for other in others for p in other.parameters()}
    return any(id(p) in theirs for p in module.parameters())


def apart(module: nn.Module, *others: nn.Module) -> nn.Module:
    """``module``, or a copy of it if it shares parameters with ``others``.

    Tensors are swapped in and out of networks while a loss is computed; a layer of two networks could not have one's
    and the other's at a time.
    """
    return deepcopy(module) if shares_parameters(module, *others) else module


def delayed(module: nn.Module, *others: nn.Module) -> TensorDictParams:
    """Buffers that start as copies of the parameters, for a target updater to move.

    Raises:
        ConfigurationError: if ``others`` share parameters with the module: theirs would be delayed with its own.
    """
    if shares_parameters(module, *others):
        raise ConfigurationError(
            f"delay_value=True needs a value network of its own, but this {type(module).__name__} shares parameters "
            "with the world model; accepted are separate networks, or delay_value=False."
        )
    return TensorDictParams(TensorDict.from_module(module).data.clone(), no_convert=True)
