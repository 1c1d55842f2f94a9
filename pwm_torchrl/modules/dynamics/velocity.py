"""Flows whose network predicts a velocity: ``tangent`` and the public fork's ``simnorm_velocity``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_torchrl.modules.dynamics.base import FlowDynamics, time_inputs
from pwm_torchrl.modules.layers import SimNorm, cat_features, normed_mlp


class VelocityFlow(FlowDynamics):
    """dz/dτ = v(z_τ, a, τ, ...), solved from τ = 0 to 1 by K uniform Euler or Heun substeps.

    Args:
        simnorm_dim (int): features per simplex group.
        solver (str): ``"euler"`` (K evaluations) or ``"heun"`` (2K evaluations, to τ = 1).
        substeps (int): K ≥ 1.
        checkpoint_substeps (bool): recompute the substeps in the backward pass. Defaults to ``False``.
    """

    def __init__(self, simnorm_dim: int, solver: str, substeps: int, checkpoint_substeps: bool = False) -> None:
        super().__init__(simnorm_dim, solver, substeps, checkpoint_substeps)
        self.evaluations = self.evaluations_with(solver, substeps)

    @classmethod
    def evaluations_with(cls, solver: str, substeps: int) -> int:
        """One per substep of Euler's method, two of Heun's."""
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
    """A linear velocity head with each group's mean removed, so that group sums stay what they were.

    The latent stays on the affine hull of the simplex, but may leave the simplex itself.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
        solver (str): ``"euler"`` or ``"heun"``. Defaults to ``"heun"``.
        substeps (int): K ≥ 1. Defaults to ``4``.
        condition_on_start (bool): feed z_t beside z_τ. Defaults to ``False``.
        time_features (int): sine/cosine pairs beside τ. Defaults to ``0``.
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

    Its velocity ends in SimNorm, so every group of the latent gains 1 per transition and z' − z, whose groups sum to
    0, is out of reach: rolled out with z_t on the simplex the flow-matching loss has a positive floor.

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
