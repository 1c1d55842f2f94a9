"""Layers of PWM's networks, running statistics in front of and behind them, and their compiled evaluation."""

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

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.numerics import (
    LN_EPSILON,
    group_softmax,
    linear,
    linear_norm_mish,
    mish,
    mish_norm,
    residual_endpoint,
)

# Building blocks of the networks: normed linear layers, SimNorm and weight initialisation -----------------------------


class SimNorm(nn.Module):
    """Simplicial normalisation: a softmax within groups of ``group_size`` features.

    Every group of the output is a point of the probability simplex. From TD-MPC2 (https://arxiv.org/abs/2310.16828).

    Args:
        group_size (int): features per group, V. Defaults to ``8``.

    Examples:
        >>> import torch
        >>> from pwm_torchrl.modules import SimNorm
        >>> SimNorm(4)(torch.zeros(2, 8)).sum(-1)
        tensor([2., 2.])
    """

    def __init__(self, group_size: int = 8) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        return group_softmax(x, self.group_size)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


class Mish(nn.Mish):
    """PyTorch's Mish in the fused form of :mod:`~pwm_torchrl.modules.numerics`."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


class Linear(nn.Linear):
    """PyTorch's linear layer, its product in the dtype of :func:`~pwm_torchrl.modules.numerics.products_in`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class NormedLinear(Linear):
    """Linear -> LayerNorm -> activation, with the parameter names of TD-MPC2's published checkpoints.

    Args:
        in_features (int): input width.
        out_features (int): output width.
        activation (nn.Module, optional): applied last. Defaults to ``nn.Mish()``.
    """

    def __init__(self, in_features: int, out_features: int, activation: nn.Module | None = None) -> None:
        super().__init__(in_features, out_features)
        self.ln = nn.LayerNorm(out_features)
        self.activation = Mish() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        if type(self.activation) is Mish:
            return linear_norm_mish(x, self.weight, self.bias, self.ln.weight, self.ln.bias)
        return self.activation(self.ln(super().forward(x)))


def check_simnorm(latent_dim: int, group_size: int) -> None:
    """Raise :class:`ConfigurationError` unless SimNorm groups of ``group_size`` tile ``latent_dim``."""
    if group_size < 1 or latent_dim % group_size:
        raise ConfigurationError(
            f"size.latent_dim={latent_dim} is not a multiple of size.simnorm_dim={group_size}; "
            "choose a latent width that SimNorm's groups divide."
        )


def normed_mlp(in_features: int, units: Sequence[int], out_features: int, head: nn.Module | None) -> nn.Sequential:
    """Hidden :class:`NormedLinear` layers, then ``out_features``.

    Args:
        in_features (int): input width.
        units (sequence of int): hidden widths; may be empty.
        out_features (int): output width.
        head (nn.Module, optional): activation of a last :class:`NormedLinear`; ``None`` ends in a plain ``nn.Linear``.

    Returns:
        The network, its weights initialised by :func:`init_world_model_weights`.
    """
    widths = [in_features, *units]
    layers: list[nn.Module] = [NormedLinear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
    if head is None:
        layers.append(Linear(widths[-1], out_features))
    else:
        layers.append(NormedLinear(widths[-1], out_features, head))
    net = nn.Sequential(*layers)
    net.apply(init_world_model_weights)
    return net


def init_world_model_weights(module: nn.Module) -> None:
    """TD-MPC2's initialisation: linear weights truncated normal (std 0.02), biases 0, embeddings uniform ±0.02.

    Layer norms become the identity, which they are when they are built.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -0.02, 0.02)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


class PolicyMLP(nn.Sequential):
    """(Linear -> Mish -> LayerNorm) blocks, then a plain Linear; Mish and LayerNorm are computed as one."""

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, len(self) - 1, 3):
            norm = cast("nn.LayerNorm", self[k + 2])
            x = mish_norm(self[k](x), norm.weight, norm.bias)
        return self[-1](x)


def policy_mlp(in_features: int, units: Sequence[int], out_features: int) -> PolicyMLP:
    """PWM's policy-side MLP with PyTorch's initialisation."""
    layers: list[nn.Module] = []
    width = in_features
    for unit in units:
        layers += [Linear(width, unit), Mish(), nn.LayerNorm(unit)]
        width = unit
    layers.append(Linear(width, out_features))
    return PolicyMLP(*layers)


def init_actor_weights(net: nn.Sequential) -> None:
    """PyTorch's initialisation, as in PWM's code, but for a last layer of a hundredth of its size.

    Actions begin near 0: where tanh is saturated, an actor gets no gradient and may never leave.
    """
    for layer in net:
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            layer.reset_parameters()
    with torch.no_grad():
        net[-1].weight.mul_(0.01)
        net[-1].bias.zero_()


def init_critic_weights(net: nn.Sequential) -> None:
    """Linear weights orthogonal with gain √2, biases 0, and a last layer of zeros.

    Values begin at 0: random ones would be larger than true values wherever rewards are small.
    """
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]


def cat_features(*parts: Tensor | None) -> Tensor:
    """Concatenate the given tensors (``None`` is skipped) along their last dimension, broadcasting the leading ones.

    Leading dimensions of *later* parts may be missing or of size 1 (a task embedding ``[B, E]`` beside ``[H, B, D]``).
    """
    present = [p for p in parts if p is not None]
    batch = present[0].shape[:-1]
    return torch.cat([p if p.shape[:-1] == batch else p.expand(*batch, p.shape[-1]) for p in present], -1)


# Running statistics that are part of a model's state ------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Running population mean and variance over all samples seen (Chan et al., parallel update).

    The count starts at ``epsilon``, the mean at 0 and the variance at 1, so that a first batch nearly replaces them.

    Args:
        shape (tuple of int): feature shape; of several tasks ``(tasks, features)``. Defaults to ``(1,)``.
        epsilon (float): initial count. Defaults to ``1e-4``.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (1,), epsilon: float = 1e-4) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(float(epsilon), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Fold in samples ``[..., *shape]``; leading dimensions are samples."""
        mean, var, count = self.updated(x)
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.count.copy_(count)

    @torch.no_grad()
    def updated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, var, count) after folding in ``x``, leaving the module as it is."""
        x = x.detach().reshape(-1, *self.mean.shape).to(self.mean.dtype)
        n = x.shape[0]
        total = self.count + n
        delta = x.mean(0) - self.mean
        fraction = (n / total).to(self.mean.dtype)
        mean = self.mean + delta * fraction
        var = (
            self.var * (1 - fraction) + x.var(0, unbiased=False) * fraction + delta.square() * fraction * (1 - fraction)
        )
        return mean, var, total

    @torch.no_grad()
    def set(self, x: Tensor, task: int | None = None) -> None:
        """Forget what was seen, of one task or of all there is, and take samples ``[..., features]`` instead."""
        own = RunningStatistics(tuple(x.shape[-1:])).to(self.mean.device)
        own.update(x.to(self.mean.device))
        rows = slice(None) if task is None else task
        self.mean[rows] = own.mean
        self.var[rows] = own.var
        self.count.copy_(own.count)

    def normalize(
        self, x: Tensor, epsilon: float = 1e-5, clip: float | None = None, task: Tensor | None = None
    ) -> Tensor:
        """(x − mean) / sqrt(var + ε), within ±``clip``: a dimension that was constant so far may move at any time.

        ``task``, int64, chooses among statistics of several tasks; its shape is that of the last batch dimensions.
        """
        mean, var = self.mean, self.var
        if task is not None:  # not mean[task], which waits for the device where there is one task
            mean, var = F.embedding(task, mean), F.embedding(task, var)
        normalized = (x - mean) * torch.rsqrt(var + epsilon)
        return normalized if clip is None else normalized.clamp(-clip, clip)


class RewardDeviation(nn.Module):
    """The unit in which reward heads and critics compute: the running standard deviation of rewards.

    At least a tenth of the largest reward seen, so that the first of rare rewards is not a hundred units large; 1 while
    no reward was seen.
    """

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.statistics = RunningStatistics()
        self.register_buffer("largest", torch.zeros(1))

    @torch.no_grad()
    def update(self, reward: Tensor) -> None:
        """Fold in rewards ``[..., 1]``."""
        if reward.numel():
            self.statistics.update(reward)
            self.largest.copy_(torch.maximum(self.largest, reward.abs().max()))

    @torch.no_grad()
    def set(self, reward: Tensor) -> None:
        """Forget what was seen and take rewards ``[..., 1]`` instead."""
        self.statistics.set(reward)
        self.largest.copy_(reward.abs().max())

    @property
    def value(self) -> Tensor:
        """The unit ``[1]``."""
        unit = torch.maximum(self.statistics.var.sqrt(), 0.1 * self.largest)
        return torch.where(self.largest > 0, unit, torch.ones_like(unit))


class RewardScale(nn.Module):
    """Running scale of rewards: the standard deviation of the discounted return collected so far.

    Rewards are divided by it and never shifted: a shift would change which policy is best under termination.

    Args:
        num_envs (int): parallel environments.
        gamma (float): discount. Defaults to ``0.99``.
    """

    returns: Tensor

    def __init__(self, num_envs: int, gamma: float = 0.99) -> None:
        super().__init__()
        self.gamma = gamma
        self.statistics = RunningStatistics()
        self.register_buffer("returns", torch.zeros(num_envs, 1))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor) -> None:
        """Fold in rewards and done flags ``[N, T, 1]`` of consecutive steps."""
        history = []
        for r, d in zip(reward.unbind(1), done.unbind(1), strict=True):
            self.returns.mul_(self.gamma).add_(r)
            history.append(self.returns.clone())
            self.returns.masked_fill_(d, 0.0)
        self.statistics.update(torch.cat(history))

    def forward(self, reward: Tensor) -> Tensor:
        """Scaled rewards, same shape."""
        return reward * torch.rsqrt(self.statistics.var + 1e-8)


# Compiled evaluation of a network, from its inputs to the simplex -----------------------------------------------------


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

    This is the piece of a world model that repeats: a rollout of 16 steps of a flow evaluates its network 112 times.
    Unrolled into one graph it compiled for more than nine minutes; its one evaluation compiles in seconds and is called
    112 times. It is a function of tensors alone, so that swapped and frozen parameters are only other arguments: there
    is one graph for each pattern of shapes and gradients, of which a run has two, the model's update and imagination,
    and nothing is compiled again. The reward head and the policy have one evaluation where a flow has seven, and are
    not worth a graph.

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
