"""The piece of a world model that repeats, compiled: one evaluation of a network, from its inputs to the simplex.

A rollout of 16 steps of a flow evaluates its network 112 times. Unrolled into one graph it compiled for more than nine
minutes; its one evaluation compiles in seconds and is called 112 times. It is a function of tensors alone, so that
swapped and frozen parameters are only other arguments: there is one graph for each pattern of shapes and gradients, of
which a run has two, the model's update and imagination, and nothing is compiled again. The reward head and the policy
have one evaluation where a flow has seven, and are not worth a graph.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwm_torchrl.modules.layers import NormedLinear, cat_features
from pwm_torchrl.modules.numerics import LN_EPSILON, group_softmax, linear, linear_norm_mish, residual_endpoint

Layers = list[tuple[Tensor, ...]]


def evaluate(inputs: Sequence[Tensor], layers: Layers, group_size: int, latent: Tensor | None) -> Tensor:
    """An MLP of :class:`~pwm_torchrl.modules.layers.NormedLinear` on concatenated inputs, and what follows it.

    Args:
        inputs (sequence of Tensor): ``[..., features]``, leading dimensions as the first has them.
        layers (list of tuple): of :func:`layers_of`.
        group_size (int): features of a simplex group; 0 ends in the last layer.
        latent (Tensor, optional): z ``[..., D]`` where the network's output moves a latent in the endpoint
            parameterisation; ``None``: it goes through SimNorm.
    """
    x = cat_features(*inputs)
    for layer in layers[:-1]:
        x = linear_norm_mish(x, *layer)
    weight, bias, *norm = layers[-1]
    x = linear(x, weight, bias)
    if norm:
        x = F.layer_norm(x, bias.shape, norm[0], norm[1], LN_EPSILON)
    if not group_size:
        return x
    return group_softmax(x, group_size) if latent is None else residual_endpoint(latent, x, group_size)


def layers_of(net: nn.Module) -> Layers:
    """Present weight, bias and norm of every layer of a :func:`~pwm_torchrl.modules.layers.normed_mlp`."""
    layers = []
    for layer in cast("nn.Sequential", net):
        own = cast("nn.Linear", layer)
        norm = (layer.ln.weight, layer.ln.bias) if isinstance(layer, NormedLinear) else ()
        layers.append((own.weight, own.bias, *norm))
    return layers


class Piece:
    """:func:`evaluate`, compiled at the first call with inputs of a kind. Copied and pickled without what was compiled.

    Args:
        backend (str): of ``torch.compile``. Defaults to ``"inductor"``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(
        self, inputs: Sequence[Tensor | None], net: nn.Module, group_size: int = 0, latent: Tensor | None = None
    ) -> Tensor:
        """The network's output; ``None`` inputs are left out."""
        if self._compiled is None:
            # The compiler looks at every input's .grad, which PyTorch warns of where the input is not a leaf.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
            # Compiled code is kept with a function's code object: each piece has its own, and its own limit of graphs.
            own = FunctionType(evaluate.__code__.replace(co_name="evaluate"), evaluate.__globals__, "evaluate")
            self._compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)
        present = [x for x in inputs if x is not None]
        first = present[0]
        if torch.is_grad_enabled() and not first.requires_grad and any(x.requires_grad for x in present):
            # The first latents of a rollout are data. One gradient too many costs less than a graph of its own.
            present[0] = first.detach().requires_grad_()
            latent = present[0] if latent is first else latent
        return self._compiled(present, layers_of(net), group_size, latent)

    def __deepcopy__(self, memo: Any) -> Piece:
        return Piece(self.backend)

    def __reduce__(self) -> tuple[type[Piece], tuple[str]]:
        return type(self), (self.backend,)


def compiler_missing() -> str | None:
    """What ``torch.compile`` lacks on this machine, as the start of a sentence; ``None`` if nothing."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if any(shutil.which(name) for name in wanted):
        return None
    return f"No C++ compiler was found ({', '.join(wanted)})"
