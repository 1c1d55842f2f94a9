"""Flow dynamics from z_t to z_{t+1}: the residual-endpoint parameterisation, its one-step case, and velocity fields.

In the residual-endpoint parameterisation the network predicts a point on the simplex, not a free velocity:
x̂ = softmax_groups(log(max(z_τ, ε)) + g(z_τ, a, τ, ...)) and v = (x̂ − z_τ) / (1 − τ). With K uniform substeps every
solver step is a convex combination of simplex points, so a latent never leaves the simplex, whatever the weights.
In ``tangent`` and the public fork's ``simnorm_velocity``, the network predicts a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics.base import Dynamics, FlowDynamics
from pwm_torchrl.modules.dynamics.fused import Schedule, fused_transition, fuses
from pwm_torchrl.modules.layers import SimNorm, cat_features, normed_mlp
from pwm_torchrl.modules.numerics import residual_endpoint

# The residual-endpoint parameterisation -------------------------------------------------------------------------------


class ResidualDynamics(Dynamics):
    """The residual-endpoint parameterisation in one step: z' = softmax_groups(log z + g([z, e, a])).

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        task_dim: int,
        units: Sequence[int],
        simnorm_dim: int = 8,
    ) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        self.net = normed_mlp(latent_dim + task_dim + action_dim, units, latent_dim, head=None)

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        if self.piece is not None:
            return self.piece([latent, task_embedding, action], self.net, self.simnorm_dim, latent)
        logits = self.net(cat_features(latent, task_embedding, action))
        return residual_endpoint(latent, logits, self.simnorm_dim)


class ResidualEndpointFlow(FlowDynamics):
    """Flow-matching dynamics in the residual-endpoint parameterisation (flow matching: arXiv 2210.02747).

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
        solver (str): ``"euler"`` or ``"heun"``. Heun's last substep is Euler's, so that the flow ends on x̂.
            Defaults to ``"heun"``.
        substeps (int): K ≥ 1. Defaults to ``4``.
        condition_on_start (bool): add z_t to the network's input. Defaults to ``False``.
        time_features (int): sine/cosine pairs of τ to add to its input. Defaults to ``0``.
        condition_on_step_size (bool): add the step size to its input. Defaults to ``False``.
        checkpoint_substeps (bool): recompute the substeps in the backward pass, so that stored activations do not grow
            with K; gradients are identical. Defaults to ``False``.
        imagination_substeps (int, optional): Euler substeps of :meth:`imagine`, a few-step map that the model loss
            trains in addition to ``solver``. Defaults to ``None``: :meth:`imagine` uses ``solver``, too.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        task_dim: int,
        units: Sequence[int],
        simnorm_dim: int = 8,
        solver: str = "heun",
        substeps: int = 4,
        condition_on_start: bool = False,
        time_features: int = 0,
        condition_on_step_size: bool = False,
        checkpoint_substeps: bool = False,
        imagination_substeps: int | None = None,
    ) -> None:
        super().__init__(simnorm_dim, solver, substeps, checkpoint_substeps)
        self.condition_on_start = condition_on_start
        self.time_features = time_features
        self.condition_on_step_size = condition_on_step_size
        self.imagination_substeps = imagination_substeps
        self.evaluations = self.evaluations_with(solver, substeps)
        in_features = self.input_features(
            latent_dim + task_dim + action_dim,
            latent_dim,
            condition_on_start,
            time_features,
            condition_on_step_size,
        )
        self.net = normed_mlp(in_features, units, latent_dim, head=None)

    @classmethod
    def evaluations_with(cls, solver: str, substeps: int) -> int:
        """One per Euler substep, two per Heun substep except the last, which is an Euler step."""
        return Schedule(solver, substeps).evaluations

    @staticmethod
    def input_features(
        base: int,
        latent_dim: int,
        condition_on_start: bool,
        time_features: int,
        condition_on_step_size: bool,
    ) -> int:
        """Width of the network's input; ``base`` is the width of [z, e, a]."""
        return base + 1 + 2 * time_features + latent_dim * condition_on_start + int(condition_on_step_size)

    def endpoint(
        self,
        latent: Tensor,
        start: Tensor,
        action: Tensor,
        tau: float | Tensor,
        step_size: float | Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """x̂(z_τ, a, τ) ``[..., D]``, the predicted endpoint of the flow.

        Args:
            latent (Tensor): z_τ ``[..., D]``.
            start (Tensor): z_t ``[..., D]``, used only with ``condition_on_start``.
            action (Tensor): ``[..., A]``.
            tau (float or Tensor): flow time, a number or ``[..., 1]``.
            step_size (float or Tensor): used only with ``condition_on_step_size``.
            task_embedding (Tensor, optional): ``[..., E]``.
        """
        inputs = (
            latent,
            task_embedding,
            action,
            time_inputs(tau, latent, self.time_features),
            start if self.condition_on_start else None,
            time_inputs(step_size, latent, 0) if self.condition_on_step_size else None,
        )
        if self.piece is not None:
            return self.piece(inputs, self.net, self.simnorm_dim, latent)
        return residual_endpoint(latent, self.net(cat_features(*inputs)), self.simnorm_dim)

    def integrate(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        return self._solve(latent, action, task_embedding, self.solver, self.substeps)

    def imagine(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Next latent ``[..., D]`` in ``imagination_substeps`` Euler steps, one evaluation each, if that is set."""
        if self.imagination_substeps is None:
            return self(latent, action, task_embedding)
        return self._solve(latent, action, task_embedding, "euler", self.imagination_substeps)

    def _solve(
        self, latent: Tensor, action: Tensor, task_embedding: Tensor | None, solver: str, substeps: int
    ) -> Tensor:
        """Solve the flow; see :meth:`~pwm_torchrl.modules.dynamics.fused.Schedule.solve`."""
        schedule = Schedule(solver, substeps)
        if self.piece is None and not self.condition_on_start and fuses(self.net):
            return self._solve_fused(latent, action, task_embedding, schedule)

        def endpoint(z: Tensor, tau: float) -> Tensor:
            return self.endpoint(z, latent, action, tau, 1 / substeps, task_embedding)

        return schedule.solve(endpoint, latent)

    def _solve_fused(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None, schedule: Schedule) -> Tensor:
        """:meth:`_solve` as one autograd function."""
        tau = schedule.times(latent).unsqueeze(1)
        times = time_inputs(tau, tau, self.time_features)
        if self.condition_on_step_size:
            times = torch.cat([times, torch.full_like(tau, 1 / schedule.substeps)], 1)
        context = cat_features(latent[..., :0], task_embedding, action)
        rows = latent.reshape(-1, latent.shape[-1]), context.reshape(-1, context.shape[-1])
        return fused_transition(*rows, times, self.net, self.simnorm_dim, schedule).view(latent.shape)

    def flow_matching_error(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        tau: Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """MSE(x̂(z_τ, a, τ), z̄) at z_τ = (1 − τ) z_s + τ z̄, ``[..., 1]``: flow matching in endpoint space."""
        z_tau = (1 - tau) * source + tau * target
        x_hat = self.endpoint(z_tau, source, action, tau, 0.0, task_embedding)
        return (x_hat - target).square().mean(-1, keepdim=True)

    def self_consistency_error(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        half_step: Tensor,
        tau: Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """Squared error ``[..., 1]`` of one step of size 2d against two of size d (shortcut models, arXiv 2410.12557).

        Args:
            source (Tensor): z_s ``[..., D]``.
            target (Tensor): z̄ ``[..., D]``.
            action (Tensor): ``[..., A]``.
            half_step (Tensor): d, ``[..., 1]``.
            tau (Tensor): flow time at the start of the step, at most 1 − 2d, ``[..., 1]``.
            task_embedding (Tensor, optional): ``[..., E]``.

        Raises:
            ConfigurationError: without ``condition_on_step_size``.
        """
        if not self.condition_on_step_size:
            raise ConfigurationError(
                "model.loss.self_consistency_weight > 0 needs model.dynamics.condition_on_step_size=true."
            )
        d = half_step
        z_tau = (1 - tau) * source + tau * target
        with torch.no_grad():
            x_1 = self.endpoint(z_tau, source, action, tau, d, task_embedding)
            z_middle = z_tau + d / (1 - tau) * (x_1 - z_tau)
            x_2 = self.endpoint(z_middle, source, action, tau + d, d, task_embedding)
            goal = ((1 - tau - 2 * d) * x_1 + (1 - tau) * x_2) / (2 * (1 - tau - d))
        x_hat = self.endpoint(z_tau, source, action, tau, 2 * d, task_embedding)
        return (x_hat - goal).square().mean(-1, keepdim=True)


# Networks that predict a velocity -------------------------------------------------------------------------------------


class VelocityFlow(FlowDynamics):
    """dz/dτ = v(z_τ, a, τ, ...), solved from τ = 0 to 1 by K uniform Euler or Heun substeps.

    Args:
        simnorm_dim (int): features per simplex group.
        solver (str): ``"euler"`` (K evaluations) or ``"heun"`` (2K evaluations, the last at τ = 1).
        substeps (int): K ≥ 1.
        checkpoint_substeps (bool): recompute the substeps in the backward pass. Defaults to ``False``.
    """

    def __init__(self, simnorm_dim: int, solver: str, substeps: int, checkpoint_substeps: bool = False) -> None:
        super().__init__(simnorm_dim, solver, substeps, checkpoint_substeps)
        self.evaluations = self.evaluations_with(solver, substeps)

    @classmethod
    def evaluations_with(cls, solver: str, substeps: int) -> int:
        """One per Euler substep, two per Heun substep."""
        return substeps if solver == "euler" else 2 * substeps

    def velocity(
        self,
        latent: Tensor,
        start: Tensor,
        action: Tensor,
        tau: float | Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``[..., D]`` at z_τ."""
        raise NotImplementedError

    def integrate(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Solve the flow from τ = 0 to 1 in K uniform substeps."""
        z, dt = latent, 1 / self.substeps
        for k in range(self.substeps):
            v_a = self.velocity(z, latent, action, k / self.substeps, task_embedding)
            if self.solver == "euler":
                z = z + dt * v_a
            else:
                v_b = self.velocity(z + dt * v_a, latent, action, (k + 1) / self.substeps, task_embedding)
                z = z + (dt / 2) * (v_a + v_b)
        return z

    def flow_matching_error(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        tau: Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """MSE(v(z_τ, a, τ), z̄ − z_s) at z_τ = (1 − τ) z_s + τ z̄, ``[..., 1]``."""
        z_tau = (1 - tau) * source + tau * target
        v = self.velocity(z_tau, source, action, tau, task_embedding)
        return (v - (target - source)).square().mean(-1, keepdim=True)


class TangentFlow(VelocityFlow):
    """Velocity flow with a linear output whose group means are removed, so that group sums of the latent do not change.

    The latent stays in the affine hull of the simplex, but may leave the simplex itself.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
        solver (str): ``"euler"`` or ``"heun"``. Defaults to ``"heun"``.
        substeps (int): K ≥ 1. Defaults to ``4``.
        condition_on_start (bool): add z_t to the network's input. Defaults to ``False``.
        time_features (int): sine/cosine pairs of τ to add to its input. Defaults to ``0``.
        checkpoint_substeps (bool): recompute the substeps in the backward pass. Defaults to ``False``.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        task_dim: int,
        units: Sequence[int],
        simnorm_dim: int = 8,
        solver: str = "heun",
        substeps: int = 4,
        condition_on_start: bool = False,
        time_features: int = 0,
        checkpoint_substeps: bool = False,
    ) -> None:
        super().__init__(simnorm_dim, solver, substeps, checkpoint_substeps)
        self.condition_on_start = condition_on_start
        self.time_features = time_features
        in_features = latent_dim * (1 + condition_on_start) + task_dim + action_dim + 1 + 2 * time_features
        self.net = normed_mlp(in_features, units, latent_dim, head=None)

    def velocity(
        self,
        latent: Tensor,
        start: Tensor,
        action: Tensor,
        tau: float | Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        inputs = cat_features(
            latent,
            task_embedding,
            action,
            time_inputs(tau, latent, self.time_features),
            start if self.condition_on_start else None,
        )
        groups = self.net(inputs).unflatten(-1, (-1, self.simnorm_dim))
        return (groups - groups.mean(-1, keepdim=True)).flatten(-2)


class SimNormVelocityFlow(VelocityFlow):
    """The public fork's flow, for comparison and for loading its checkpoints; not for new work.

    Its velocity ends in SimNorm, so the sum of every group grows by 1 per transition. It cannot represent z' − z, whose
    groups sum to 0: with z_t on the simplex, the flow-matching loss has a positive lower bound.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
        solver (str): ``"euler"`` or ``"heun"``. Defaults to ``"heun"``.
        substeps (int): K ≥ 1. Defaults to ``4``.
        checkpoint_substeps (bool): recompute the substeps in the backward pass. Defaults to ``False``.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        task_dim: int,
        units: Sequence[int],
        simnorm_dim: int = 8,
        solver: str = "heun",
        substeps: int = 4,
        checkpoint_substeps: bool = False,
    ) -> None:
        super().__init__(simnorm_dim, solver, substeps, checkpoint_substeps)
        self.net = normed_mlp(latent_dim + action_dim + 1 + task_dim, units, latent_dim, SimNorm(simnorm_dim))

    def velocity(
        self,
        latent: Tensor,
        start: Tensor,
        action: Tensor,
        tau: float | Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        return self.net(cat_features(latent, action, time_inputs(tau, latent, 0), task_embedding))


# Flow time as an input ------------------------------------------------------------------------------------------------


def time_inputs(tau: float | Tensor, like: Tensor, features: int) -> Tensor:
    """Flow time as network input ``[..., 1 + 2 · features]``: τ, and sines and cosines of 2^k π τ.

    Args:
        tau (float or Tensor): flow time, a number or ``[..., 1]``.
        like (Tensor): defines leading shape, dtype and device.
        features (int): sine/cosine pairs.
    """
    tau = tau if isinstance(tau, Tensor) else torch.full((1,), tau, dtype=like.dtype, device=like.device)
    parts = [tau]
    for k in range(features):
        angle = tau * (math.pi * 2**k)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, -1).expand(*like.shape[:-1], 1 + 2 * features)
