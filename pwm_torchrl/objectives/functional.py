"""Modules as functions of tensors with parameters of someone's choice: frozen, swapped, delayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

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

from pwm_torchrl.errors import ConfigurationError


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
