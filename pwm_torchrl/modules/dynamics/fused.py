"""A whole transition of the residual-endpoint dynamics as one autograd function with a closed-form gradient.

A transition of a flow evaluates its network up to 2K − 1 times. Plain autograd computes a separate weight gradient for
each evaluation: with K = 4, seven small products and seven passes over the weights to add them up. Here, one product
over the rows of all evaluations computes it. Plain autograd also recomputes for every evaluation the terms that depend
only on action and task, and concatenates the network's inputs; here that happens once per transition.

:class:`~pwm_torchrl.modules.dynamics.flows.ResidualEndpointFlow` contains a plain form of the same computation, for
compilers and for the transforms of ``torch.func``; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pwm_torchrl.modules.layers import Linear, Mish, NormedLinear
from pwm_torchrl.modules.numerics import (
    LN_EPSILON,
    endpoint_of,
    lower,
    mish_and_slope,
    mish_factor,
    plain_form,
    product,
    product_dtype,
    softmax_gradient,
    through_logarithm,
)

__all__ = ["Schedule", "fused_transition", "fuses"]


class Schedule(NamedTuple):
    """The solver of a transition: ``solver`` (``"euler"`` or ``"heun"``) and its number of ``substeps``, K."""

    solver: str
    substeps: int

    def steps(self) -> list[tuple[int, bool]]:
        """For every substep: the number of substeps left, including itself, and whether it has a second evaluation.

        Heun substeps have one, except the last, which is an Euler step.
        """
        return [(left, self.solver == "heun" and left > 1) for left in range(self.substeps, 0, -1)]

    def solve(self, endpoint: Callable[[Tensor, float], Tensor], latent: Tensor) -> Tensor:
        """Solve the flow from τ = 0 to 1 in uniform substeps.

        The weights are computed from the number m of substeps left, not as dt / (1 − τ), which exceeds 1 in floating
        point for some K. Heun's step ((m−1)/m) z + ((m−2)/(2m(m−1))) x̂_a + (1/(2(m−1))) x̂_b is computed as the mean
        of z and lerp(predictor, x̂_b, 1/(m−1)).

        Args:
            endpoint (callable): point ``[..., D]``, flow time -> x̂ ``[..., D]``.
            latent (Tensor): z at τ = 0, ``[..., D]``.
        """
        z = latent
        for left, second in self.steps():
            passed = self.substeps - left
            x_hat = endpoint(z, passed / self.substeps)
            if left == 1:
                return x_hat
            moved = torch.lerp(z, x_hat, 1 / left)
            if second:
                x_hat = endpoint(moved, (passed + 1) / self.substeps)
                moved = torch.lerp(z, torch.lerp(moved, x_hat, 1 / (left - 1)), 0.5)
            z = moved
        return z

    @property
    def evaluations(self) -> int:
        """Number of network evaluations, E."""
        return self.substeps if self.solver == "euler" else 2 * self.substeps - 1

    def times(self, like: Tensor) -> Tensor:
        """Flow time of every evaluation ``[E]``, created on the device of ``like`` to avoid a copy from the host."""
        index = torch.arange(self.evaluations, device=like.device)
        if self.solver == "heun":
            index = (index + 1) // 2  # a substep's second evaluation has the flow time of the next substep's first
        return index.to(like.dtype) / self.substeps


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def fuses(net: nn.Sequential) -> bool:
    """Whether :func:`fused_transition` supports ``net``: it must be a ``normed_mlp`` with a plain last layer.

    False under a compiler or a transform of ``torch.func``, or if a layer has hooks.
    """
    *hidden, last = net
    return (
        not plain_form()
        and type(last) is Linear
        and all(type(layer) is NormedLinear and type(layer.activation) is Mish for layer in hidden)
        and not any(has_hooks(module) for module in (net, *net))
    )


def fused_transition(
    latent: Tensor, context: Tensor, times: Tensor, net: nn.Sequential, group_size: int, schedule: Schedule
) -> Tensor:
    """Next latent ``[N, D]``.

    Args:
        latent (Tensor): z ``[N, D]``.
        context (Tensor): the network's inputs from task and action, ``[N, C]``.
        times (Tensor): its inputs from flow time and step size for each of E evaluations, ``[E, F]``.
        net (nn.Sequential): from :func:`~pwm_torchrl.modules.layers.normed_mlp`, with inputs [z, context, times].
        group_size (int): features per simplex group.
        schedule (Schedule): the solver.
    """
    *hidden, last = (cast("nn.Linear", layer) for layer in net)
    parameters = [p for x in hidden for p in (x.weight, x.bias, x.ln.weight, x.ln.bias)]
    parameters += [last.weight, last.bias]
    how = _How(group_size, schedule, product_dtype(), torch.is_grad_enabled())
    return _Transition.apply(how, latent, context, times, *parameters)


class _How(NamedTuple):
    """Arguments of a transition that are not tensors."""

    group_size: int
    schedule: Schedule
    products: torch.dtype | None  # dtype of products
    keep: bool  # whether to save tensors for a backward pass


class _Network:
    """The parameters of a network by role, and the columns of its first weight by input."""

    def __init__(self, parameters: Sequence[Tensor], latent: int, context: int, products: torch.dtype | None) -> None:
        *hidden, weight, bias = parameters
        self.weights, self.biases = [*hidden[0::4], weight], [*hidden[1::4], bias]
        self.scales, self.shifts = hidden[2::4], hidden[3::4]
        first = self.weights[0]
        self.of_latent = lower(first[:, :latent], products)
        self.of_context = first[:, latent : latent + context]
        self.of_times = first[:, latent + context :]


class _Transition(torch.autograd.Function):
    """The transition of :func:`fused_transition`.

    It saves context, times and parameters; the points ``[E, N, D]``; if weights need a gradient, the inputs
    ``[E, N, I]`` of every layer but the first; and for each evaluation, u, mean, rstd and slope of every hidden layer,
    and x̂.
    """

    @staticmethod
    def forward(ctx: Any, how: _How, latent: Tensor, context: Tensor, times: Tensor, *parameters: Tensor) -> Tensor:
        group_size, schedule, products, keep = how
        keep = keep and any(ctx.needs_input_grad)
        net = _Network(parameters, latent.shape[1], context.shape[1], products)
        evaluations = schedule.evaluations
        shared = product(lower(context, products), net.of_context, net.biases[0], products)
        offsets = times @ net.of_times.t()
        points = latent.new_empty(evaluations, *latent.shape) if keep else None
        inputs: list[Tensor] = []
        weighted = keep and any(ctx.needs_input_grad[4:])  # imagination holds the parameters fixed
        if weighted:
            rows = (evaluations, len(latent))
            inputs = [latent.new_empty(*rows, w.shape[1], dtype=products or latent.dtype) for w in net.weights[1:]]
        saved: list[Tensor] = []
        index = -1

        def endpoint(point: Tensor, tau: float) -> Tensor:
            nonlocal index
            index += 1
            if points is not None:
                point = points[index].copy_(point)
            base = shared + offsets[index]
            if products is None:
                u = torch.addmm(base, point, net.of_latent.t())
            else:
                u = base.add_(torch.mm(lower(point, products), net.of_latent.t()))
            for k, (scale, shift) in enumerate(zip(net.scales, net.shifts, strict=True)):
                normed, mean, rstd = torch.native_layer_norm(u, scale.shape, scale, shift, LN_EPSILON)
                room = inputs[k][index] if inputs else None
                if keep:
                    y, slope = mish_and_slope(normed, room if products is None else None)
                    saved.extend((u, mean, rstd, slope))
                else:
                    y = mish_factor(normed)[0].mul_(normed)
                if products is not None:
                    y = y.to(products) if room is None else room.copy_(y)
                u = product(y, net.weights[k + 1], net.biases[k + 1], products)
            x_hat = endpoint_of(point, u, group_size)
            if keep:
                saved.append(x_hat)
            return x_hat

        z = schedule.solve(endpoint, latent)
        if keep:
            ctx.how, ctx.weighted, ctx.counts = how, weighted, (len(parameters), len(inputs))
            ctx.save_for_backward(context, times, points, *parameters, *inputs, *saved)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group_size, schedule, products, _ = ctx.how
        context, times, points, *rest = ctx.saved_tensors
        count, layers = ctx.counts
        parameters, inputs, saved = rest[:count], rest[count : count + layers], rest[count + layers :]
        net = _Network(parameters, points.shape[2], context.shape[1], products)
        later = [lower(w, products) for w in net.weights[1:]]
        needs_context = ctx.needs_input_grad[2]
        evaluations, rows = points.shape[:2]
        # Gradients of the products' outputs, [E, N, O]; weight gradients are computed over all evaluations at once.
        grads = [points.new_empty(evaluations, rows, len(w)) for w in net.weights] if ctx.weighted else []
        to_scales = [torch.zeros_like(scale) for scale in net.scales] if ctx.weighted else []
        to_shifts = [torch.zeros_like(shift) for shift in net.shifts] if ctx.weighted else []
        to_shared = points.new_zeros(rows, len(net.weights[0]))
        stride = 4 * len(later) + 1
        index = evaluations

        def back(to_x_hat: Tensor) -> Tensor:
            """The gradient of an evaluation's point from that of its x̂; called for evaluations in reverse order."""
            nonlocal index, to_shared
            index -= 1
            *hidden, x_hat = saved[index * stride : (index + 1) * stride]
            point = points[index]
            room = grads[-1][index].view(-1, group_size) if grads else None
            to_u = softmax_gradient(x_hat.view(-1, group_size), to_x_hat.reshape(-1, group_size), room)
            to_u = to_u.view(point.shape)
            to_point = through_logarithm(to_u, point)
            for k in reversed(range(len(later))):
                u, mean, rstd, slope = hidden[4 * k : 4 * k + 4]
                to_y = torch.mm(lower(to_u, products), later[k]).to(u.dtype)
                to_u, to_scale, to_shift = torch.ops.aten.native_layer_norm_backward(
                    to_y.mul_(slope),
                    u,
                    net.scales[k].shape,
                    mean,
                    rstd,
                    net.scales[k],
                    net.shifts[k],
                    [True, bool(grads), bool(grads)],
                )
                if grads:
                    to_u = grads[k][index].copy_(to_u)
                    to_scales[k] += to_scale
                    to_shifts[k] += to_shift
            if not grads:
                to_shared += to_u
            if products is None:
                return to_point.addmm_(to_u, net.of_latent)
            return to_point.add_(torch.mm(lower(to_u, products), net.of_latent))

        to_z = gradient
        for left, second in reversed(schedule.steps()):
            if left == 1:
                to_z = back(to_z)
                continue
            kept = 1 - 1 / left
            if second:
                half = to_z * 0.5
                share = 1 / (left - 1)
                to_moved = back(half * share).add_(half, alpha=1 - share)
                to_z = back(to_moved / left).add_(to_moved, alpha=kept).add_(half)
            else:
                to_z = back(to_z / left).add_(to_z, alpha=kept)

        to_context = None
        if grads:
            to_shared = grads[0].sum(0)
        if needs_context:
            to_context = torch.mm(lower(to_shared, products), lower(net.of_context, products)).to(context.dtype)
        if not grads:
            return (None, to_z, to_context, None, *(None,) * len(parameters))

        def over_all(gradient: Tensor, x: Tensor) -> Tensor:
            gradient = lower(gradient.view(-1, gradient.shape[-1]), products)
            return torch.mm(gradient.t(), lower(x.view(-1, x.shape[-1]), products)).to(points.dtype)

        to_first = over_all(grads[0], points), over_all(to_shared, context), torch.mm(grads[0].sum(1).t(), times)
        to_weights = [torch.cat(to_first, 1), *map(over_all, grads[1:], inputs)]
        to_biases = [to_shared.sum(0), *(g.sum((0, 1)) for g in grads[1:])]
        hidden = zip(to_weights[:-1], to_biases[:-1], to_scales, to_shifts, strict=True)
        return (None, to_z, to_context, None, *chain.from_iterable(hidden), to_weights[-1], to_biases[-1])
