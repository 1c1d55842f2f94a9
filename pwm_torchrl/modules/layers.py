"""Layers of PWM's networks, running statistics of their inputs and outputs, and their compiled evaluation."""

from __future__ import annotations

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

    Every group of the output is a point on the probability simplex. From TD-MPC2 (https://arxiv.org/abs/2310.16828).

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
    """PyTorch's linear layer, with its product in the dtype of :func:`~pwm_torchrl.modules.numerics.products_in`."""

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
    """Raise :class:`ConfigurationError` unless ``latent_dim`` is a multiple of ``group_size``."""
    if group_size < 1 or latent_dim % group_size:
        raise ConfigurationError(
            f"size.latent_dim={latent_dim} is not a multiple of size.simnorm_dim={group_size}; "
            "choose a latent width that SimNorm's groups divide."
        )


def normed_mlp(in_features: int, units: Sequence[int], out_features: int, head: nn.Module | None) -> nn.Sequential:
    """An MLP of hidden :class:`NormedLinear` layers and an output layer.

    Args:
        in_features (int): input width.
        units (sequence of int): hidden widths; may be empty.
        out_features (int): output width.
        head (nn.Module, optional): activation of a last :class:`NormedLinear`; ``None``: the last layer is a plain
            :class:`Linear`.

    Returns:
        The network, initialised by :func:`init_world_model_weights`.
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

    Layer norms are reset to the identity.
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
    """(Linear -> Mish -> LayerNorm) blocks, then a plain Linear; Mish and LayerNorm are fused."""

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
    """PyTorch's initialisation, as in PWM's code, except that the last layer is 100 times smaller.

    Actions then start near 0. With a saturated tanh, an actor gets no gradient and may never recover.
    """
    for layer in net:
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            layer.reset_parameters()
    with torch.no_grad():
        net[-1].weight.mul_(0.01)
        net[-1].bias.zero_()


def init_critic_weights(net: nn.Sequential) -> None:
    """Orthogonal linear weights with gain √2, biases 0, and a last layer of zeros.

    Values then start at 0. If rewards are small, random values would be larger than the true ones.
    """
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]


def cat_features(*parts: Tensor | None) -> Tensor:
    """Concatenate the tensors (``None`` is skipped) along their last dimension, broadcasting the leading ones.

    Leading dimensions of *later* parts may be missing or of size 1, such as those of a task embedding ``[B, E]`` next
    to a latent ``[H, B, D]``.
    """
    present = [p for p in parts if p is not None]
    batch = present[0].shape[:-1]
    return torch.cat([p if p.shape[:-1] == batch else p.expand(*batch, p.shape[-1]) for p in present], -1)


# Running statistics that are part of a model's state ------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Running population mean and variance over all samples seen (Chan et al., parallel update).

    The count starts at ``epsilon``, the mean at 0 and the variance at 1; the first batch almost replaces them.

    Args:
        shape (tuple of int): feature shape; ``(tasks, features)`` for several tasks. Defaults to ``(1,)``.
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
        """Add samples ``[..., *shape]``; leading dimensions are samples."""
        mean, var, count = self.updated(x)
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.count.copy_(count)

    @torch.no_grad()
    def updated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, var, count) as after :meth:`update`, without changing the module."""
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
        """Replace the statistics, of one task or of all, by those of samples ``[..., features]``."""
        own = RunningStatistics(tuple(x.shape[-1:])).to(self.mean.device)
        own.update(x.to(self.mean.device))
        rows = slice(None) if task is None else task
        self.mean[rows] = own.mean
        self.var[rows] = own.var
        self.count.copy_(own.count)

    def normalize(
        self, x: Tensor, epsilon: float = 1e-5, clip: float | None = None, task: Tensor | None = None
    ) -> Tensor:
        """(x − mean) / sqrt(var + ε), clipped to ±``clip``, since a dimension that was constant so far may change.

        ``task``, int64, selects one of several tasks' statistics; its shape is that of the last batch dimensions.
        """
        mean, var = self.mean, self.var
        if task is not None:  # not mean[task], which synchronises with the device if there is a single index
            mean, var = F.embedding(task, mean), F.embedding(task, var)
        normalized = (x - mean) * torch.rsqrt(var + epsilon)
        return normalized if clip is None else normalized.clamp(-clip, clip)


class RewardDeviation(nn.Module):
    """The unit in which reward heads and critics compute: the running standard deviation of rewards.

    It is at least a tenth of the largest absolute reward so far, so that the first of rare rewards does not measure a
    hundred units. It is 1 until a nonzero reward is seen.
    """

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.statistics = RunningStatistics()
        self.register_buffer("largest", torch.zeros(1))

    @torch.no_grad()
    def update(self, reward: Tensor) -> None:
        """Add rewards ``[..., 1]``."""
        if reward.numel():
            self.statistics.update(reward)
            self.largest.copy_(torch.maximum(self.largest, reward.abs().max()))

    @torch.no_grad()
    def set(self, reward: Tensor) -> None:
        """Replace the statistics by those of rewards ``[..., 1]``."""
        self.statistics.set(reward)
        self.largest.copy_(reward.abs().max())

    @property
    def value(self) -> Tensor:
        """The unit ``[1]``."""
        unit = torch.maximum(self.statistics.var.sqrt(), 0.1 * self.largest)
        return torch.where(self.largest > 0, unit, torch.ones_like(unit))


class RewardScale(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return collected so far.

    Rewards are not shifted, since a shift would change the optimal policy in environments that terminate.

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
        """Add rewards and done flags ``[N, T, 1]`` of consecutive steps."""
        history = []
        for r, d in zip(reward.unbind(1), done.unbind(1), strict=True):
            self.returns.mul_(self.gamma).add_(r)
            history.append(self.returns.clone())
            self.returns.masked_fill_(d, 0.0)
        self.statistics.update(torch.cat(history))

    def forward(self, reward: Tensor) -> Tensor:
        """Scaled rewards, same shape."""
        return reward * torch.rsqrt(self.statistics.var + 1e-8)


# Compiled evaluation of a network, including the projection onto the simplex ------------------------------------------


Layers = list[tuple[Tensor, ...]]


def evaluate(inputs: Sequence[Tensor], layers: Layers, group_size: int, latent: Tensor | None) -> Tensor:
    """An MLP of :class:`~pwm_torchrl.modules.layers.NormedLinear` on concatenated inputs, and its output projection.

    Args:
        inputs (sequence of Tensor): ``[..., features]``, with the leading dimensions of the first.
        layers (list of tuple): from :func:`layers_of`.
        group_size (int): features per simplex group; 0: no projection.
        latent (Tensor, optional): z ``[..., D]``, if the output is projected by :func:`residual_endpoint`; ``None``: by
            SimNorm.
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
    """Current weight, bias and norm of every layer of a :func:`~pwm_torchrl.modules.layers.normed_mlp`."""
    layers = []
    for layer in cast("nn.Sequential", net):
        own = cast("nn.Linear", layer)
        norm = (layer.ln.weight, layer.ln.bias) if isinstance(layer, NormedLinear) else ()
        layers.append((own.weight, own.bias, *norm))
    return layers


class Piece:
    """:func:`evaluate`, compiled at the first call. Copies and pickles do not contain the compiled code.

    A flow evaluates its network 112 times in a rollout of 16 steps. Compiling the unrolled rollout took more than nine
    minutes; compiling one evaluation takes seconds. The compiled function takes only tensors, so swapped and frozen
    parameters are just other arguments. There is one graph per pattern of shapes and gradients; a run has two, for the
    model update and for imagination, and never recompiles. Reward head and policy are evaluated once where a flow is
    evaluated seven times, so compiling them does not pay.

    Args:
        backend (str): backend of ``torch.compile``. Defaults to ``"inductor"``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(
        self, inputs: Sequence[Tensor | None], net: nn.Module, group_size: int = 0, latent: Tensor | None = None
    ) -> Tensor:
        """The network's output; ``None`` inputs are skipped."""
        if self._compiled is None:
            # The compiler reads every input's .grad, and PyTorch warns about that for non-leaf tensors.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
            # Compiled graphs are cached and limited per code object, so each piece needs its own.
            own = FunctionType(evaluate.__code__.replace(co_name="evaluate"), evaluate.__globals__, "evaluate")
            self._compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self.backend)
        present = [x for x in inputs if x is not None]
        first = present[0]
        if torch.is_grad_enabled() and not first.requires_grad and any(x.requires_grad for x in present):
            # The first latents of a rollout do not require grad. An unneeded gradient costs less than another graph.
            present[0] = first.detach().requires_grad_()
            latent = present[0] if latent is first else latent
        return self._compiled(present, layers_of(net), group_size, latent)

    def __deepcopy__(self, memo: Any) -> Piece:
        return Piece(self.backend)

    def __reduce__(self) -> tuple[type[Piece], tuple[str]]:
        return type(self), (self.backend,)
