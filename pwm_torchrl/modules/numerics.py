"""Fused layers: Linear -> LayerNorm -> Mish, Linear -> Mish -> LayerNorm, and softmax within groups.

PyTorch's own Mish and its softmax over groups of 8 are not vectorised on a CPU: on ``[256, 512]`` float32 and one
thread they took 0.8 and 4.0 ms, their gradients 0.6 and 1.0 ms; the matrix product before them took 1.5 ms. The
functions here make fewer passes over memory, forward and backward, and save no more tensors. Every layer has two forms:

- an ``autograd.Function`` with the gradient in closed form, for eager mode; it supports first derivatives only,
- a plain form of differentiable operations, for ``torch.compile``, which fuses it itself, for the transforms of
  ``torch.func``, which do not support such functions, and for second derivatives. Tests compare the two.

Matrix products use the dtype of :func:`products_in`; everything else uses the inputs' dtype, float32 in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Lower bound of a latent in :func:`residual_endpoint`: SimNorm may underflow to 0, which no logits could change.
EPSILON = 1e-6
LN_EPSILON = 1e-5  # of nn.LayerNorm

# Precision of products ------------------------------------------------------------------------------------------------

_products: torch.dtype | None = None


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within the context, the layers here round the factors of matrix products to ``dtype``; ``None``: no rounding.

    Products accumulate in float32, and all other operations are float32. A backward pass uses the dtype of its forward
    pass, also outside the context.
    """
    global _products
    before, _products = _products, dtype
    try:
        yield
    finally:
        _products = before


def product_dtype() -> torch.dtype | None:
    """The current dtype of :func:`products_in`."""
    return _products


def plain_form() -> bool:
    """Whether to use plain operations, for a compiler or a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def lower(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Round a factor of a product to the product's dtype; ``None``: unchanged."""
    return x if dtype is None else x.to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """The linear map x Wᵀ + b, with the product in ``dtype`` and the result in the weight's dtype."""
    if dtype is None:
        return F.linear(x, weight, bias)
    out = F.linear(x.to(dtype), weight.to(dtype)).to(weight.dtype)
    return out if bias is None else out + bias


def _product_gradients(
    ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, first: int = 0
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The required gradients of x, W and b; ``x`` was saved in the product's dtype."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    low = lower(rows, ctx.products)
    needs = ctx.needs_input_grad[first : first + 3]
    to_x = to_weight = to_bias = None
    if needs[0]:
        to_x = low.mm(lower(weight, ctx.products)).to(weight.dtype).view(*gradient.shape[:-1], weight.shape[1])
    if needs[1]:
        to_weight = low.t().mm(x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if needs[2]:
        to_bias = rows.sum(0)
    return to_x, to_weight, to_bias


class _LowLinear(torch.autograd.Function):
    """Linear layer with products in lower precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: torch.dtype) -> Tensor:
        low = x.to(products)
        ctx.products = products
        ctx.save_for_backward(low, weight)
        return product(low, weight, bias, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*_product_gradients(ctx, gradient, *ctx.saved_tensors), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map x Wᵀ + b ``[..., O]``."""
    if _products is None:
        return F.linear(x, weight, bias)
    if plain_form():
        return product(x, weight, bias, _products)
    return _LowLinear.apply(x, weight, bias, _products)


# Mish -----------------------------------------------------------------------------------------------------------------


def mish_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors tanh(softplus(x)) and s = sigmoid(x); the first is w / (2 − w) with w = s (2 − s)."""
    s = torch.sigmoid(x)
    w = torch.rsub(s, 2).mul_(s)
    return w.div_(torch.rsub(w, 2)), s


def mish_and_slope(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mish, in ``out`` if given, and its derivative t + s (x − y t): t = tanh(softplus(x)), s = sigmoid(x), y = x t."""
    t, s = mish_factor(x)
    y = torch.mul(x, t, out=out)
    return y, torch.addcmul(t, s, torch.addcmul(x, y, t, value=-1))


def plain_mish(x: Tensor) -> Tensor:
    """Mish as a ratio, which compilers can vectorise."""
    s = torch.sigmoid(x)
    w = s * (2 - s)
    return x * (w / (2 - w))


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool) -> Tensor:
        if not keep:
            return mish_factor(x)[0].mul_(x)
        y, slope = mish_and_slope(x)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def mish(x: Tensor) -> Tensor:
    """Mish, x · tanh(softplus(x)), elementwise (https://arxiv.org/abs/1908.08681)."""
    return plain_mish(x) if plain_form() else _Mish.apply(x, torch.is_grad_enabled())


# Softmax within groups ------------------------------------------------------------------------------------------------


def exponentials(x: Tensor, size: int) -> Tensor:
    """Exponentials of x − max within groups, ``[-1, size]``."""
    groups = x.reshape(-1, size)
    return torch.sub(groups, groups.amax(-1, keepdim=True)).exp_()


def softmax_gradient(y: Tensor, gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient y · (g − Σ g y) of a softmax over groups ``[-1, size]``, in ``out`` if given."""
    weighted = gradient * y
    return torch.addcmul(weighted, y, weighted.sum(-1, keepdim=True), value=-1, out=out)


def plain_group_softmax(x: Tensor, size: int) -> Tensor:
    """Plain form of :func:`group_softmax`."""
    groups = x.unflatten(-1, (-1, size))
    e = torch.exp(groups - groups.amax(-1, keepdim=True).detach())
    return (e / e.sum(-1, keepdim=True)).flatten(-2)


class _GroupSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        e = exponentials(x, size)
        y = e.div_(e.sum(-1, keepdim=True)).view(x.shape)
        ctx.size = size
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        groups = softmax_gradient(y.view(-1, ctx.size), gradient.reshape(-1, ctx.size))
        return groups.view(y.shape), None


def group_softmax(x: Tensor, size: int) -> Tensor:
    """Softmax within groups of ``size`` neighbouring features, ``[..., D]``."""
    return plain_group_softmax(x, size) if plain_form() else _GroupSoftmax.apply(x, size)


def plain_residual_endpoint(latent: Tensor, logits: Tensor, size: int) -> Tensor:
    """Plain form of :func:`residual_endpoint`."""
    groups = logits.unflatten(-1, (-1, size))
    e = torch.exp(groups - groups.amax(-1, keepdim=True).detach())
    e = e * latent.clamp_min(EPSILON).unflatten(-1, (-1, size))
    return (e / e.sum(-1, keepdim=True)).flatten(-2)


def endpoint_of(latent: Tensor, logits: Tensor, size: int) -> Tensor:
    """The values of :func:`residual_endpoint`, without a gradient."""
    # The lower bound keeps every sum above 0, since the largest exponential of a group is 1.
    e = exponentials(logits, size).mul_(latent.clamp_min(EPSILON).reshape(-1, size))
    return e.div_(e.sum(-1, keepdim=True)).view(logits.shape)


def through_logarithm(gradient: Tensor, latent: Tensor) -> Tensor:
    """Back-propagate ``gradient`` through log(max(z, ε)) to the latent z; it is 0 where z ≤ ε."""
    return torch.ops.aten.threshold_backward(gradient / latent, latent, EPSILON)


class _ResidualEndpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, logits: Tensor, size: int) -> Tensor:
        y = endpoint_of(latent, logits, size)
        ctx.size = size
        ctx.save_for_backward(latent, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        latent, y = ctx.saved_tensors
        to_logits = softmax_gradient(y.view(-1, ctx.size), gradient.reshape(-1, ctx.size)).view(y.shape)
        to_latent = None
        if ctx.needs_input_grad[0]:
            to_latent = through_logarithm(to_logits, latent)
        return to_latent, to_logits, None


def residual_endpoint(latent: Tensor, logits: Tensor, size: int) -> Tensor:
    """Softmax within groups of log(max(z, ε)) + logits, ``[..., D]``, computed without the logarithm."""
    if plain_form() or latent.shape != logits.shape:
        return plain_residual_endpoint(latent, logits, size)
    return _ResidualEndpoint.apply(latent, logits, size)


# Layers: linear map, normalisation and Mish ---------------------------------------------------------------------------


def plain_linear_norm_mish(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Plain form of :func:`linear_norm_mish`."""
    return plain_mish(F.layer_norm(product(x, weight, bias, _products), scale.shape, scale, shift, LN_EPSILON))


class _LinearNormMish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        products: torch.dtype | None,
        keep: bool,
    ) -> Tensor:
        low = lower(x, products)
        u = product(low, weight, bias, products)
        normed, mean, rstd = torch.native_layer_norm(u, scale.shape, scale, shift, LN_EPSILON)
        if not keep:
            return mish_factor(normed)[0].mul_(normed)
        y, slope = mish_and_slope(normed)
        ctx.products = products
        ctx.save_for_backward(low, weight, u, mean, rstd, scale, shift, slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, u, mean, rstd, scale, shift, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad
        to_u, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
            gradient * slope, u, scale.shape, mean, rstd, scale, shift, [True, needs[3], needs[4]]
        )
        return (*_product_gradients(ctx, to_u, low, weight), to_scale, to_shift, None, None)


def linear_norm_mish(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Mish(LayerNorm(x Wᵀ + b)) ``[..., O]``."""
    if plain_form():
        return plain_linear_norm_mish(x, weight, bias, scale, shift)
    return _LinearNormMish.apply(x, weight, bias, scale, shift, _products, torch.is_grad_enabled())


def plain_mish_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Plain form of :func:`mish_norm`."""
    return torch.addcmul(shift, F.layer_norm(plain_mish(x), x.shape[-1:], eps=LN_EPSILON), scale)


class _MishNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, keep: bool) -> Tensor:
        y, slope = mish_and_slope(x) if keep else (x * mish_factor(x)[0], None)
        normed, _, rstd = torch.native_layer_norm(y, x.shape[-1:], None, None, LN_EPSILON)
        if keep:
            ctx.save_for_backward(slope, normed, rstd, scale)
        return torch.addcmul(shift, normed, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slope, normed, rstd, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        to_x = to_scale = to_shift = None
        if needs[0]:
            g = gradient * scale
            mean = g.mean(-1, keepdim=True)
            along = torch.mul(g, normed).mean(-1, keepdim=True)
            to_x = g.sub_(mean).addcmul_(normed, along, value=-1).mul_(rstd).mul_(slope)
        if needs[1]:
            to_scale = (gradient * normed).sum_to_size(scale.shape)
        if needs[2]:
            to_shift = gradient.sum_to_size(scale.shape)
        return to_x, to_scale, to_shift, None


def mish_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(Mish(x)) · scale + shift; scale and shift broadcast against ``x``."""
    if plain_form():
        return plain_mish_norm(x, scale, shift)
    return _MishNorm.apply(x, scale, shift, torch.is_grad_enabled())


# Products of an ensemble ----------------------------------------------------------------------------------------------


def _batched(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    return torch.bmm(x.to(dtype), weight.to(dtype).mT).to(bias.dtype) + bias.unsqueeze(1)


class _LowBatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, products: torch.dtype) -> Tensor:
        low = x.to(products)
        ctx.products = products
        ctx.save_for_backward(low, weight)
        return _batched(low, weight, bias, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        low = gradient.to(ctx.products)
        needs = ctx.needs_input_grad
        return (
            torch.bmm(low, weight.to(ctx.products)).to(weight.dtype) if needs[0] else None,
            torch.bmm(low.mT, x).to(weight.dtype) if needs[1] else None,
            gradient.sum(1) if needs[2] else None,
            None,
        )


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear map x Wᵀ + b of every member: ``[K, N, I]``, ``[K, O, I]``, ``[K, O]`` -> ``[K, N, O]``."""
    if _products is None or plain_form():
        return _batched(x, weight, bias, _products)
    return _LowBatchedLinear.apply(x, weight, bias, _products)
