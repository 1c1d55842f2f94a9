"""Base classes of latent dynamics and flows, the MLP dynamics, and helpers that the kinds share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pwm_torchrl.modules.layers import Piece, SimNorm, cat_features, normed_mlp


class Dynamics(nn.Module):
    """Latent dynamics d(z, a, e) -> z'.

    Shapes: latent ``[..., D]``, action ``[..., A]``, task embedding ``[..., E]`` or ``None``, result ``[..., D]``.
    """

    #: network evaluations per transition
    evaluations: int = 1
    #: compiled evaluation of the network; ``None``: the modules are called one by one
    piece: Piece | None = None
    #: network evaluations per transition of :meth:`imagine`, if it differs from ``forward``
    imagination_substeps: int | None = None

    @classmethod
    def evaluations_with(cls, solver: str, substeps: int) -> int:
        """Network evaluations per transition with a given solver; kinds without one ignore the arguments."""
        return cls.evaluations

    @property
    def few_step(self) -> bool:
        """Whether :meth:`imagine` differs from ``forward``."""
        return self.imagination_substeps is not None

    @property
    def imagined_evaluations(self) -> int:
        """Network evaluations per transition of :meth:`imagine`."""
        return self.evaluations if self.imagination_substeps is None else self.imagination_substeps

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Next latent ``[..., D]``."""
        raise NotImplementedError

    def imagine(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Next latent ``[..., D]`` in imagined rollouts; the same as ``forward`` for most dynamics."""
        return self(latent, action, task_embedding)


class MLPDynamics(Dynamics):
    """z' = SimNorm(MLP([z, e, a])), as in TD-MPC2 and PWM.

    Args:
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths.
        simnorm_dim (int): features per SimNorm group. Defaults to ``8``.
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
        self.net = normed_mlp(latent_dim + task_dim + action_dim, units, latent_dim, SimNorm(simnorm_dim))

    def forward(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        if self.piece is not None:
            return self.piece([latent, task_embedding, action], self.net, self.simnorm_dim)
        return self.net(cat_features(latent, task_embedding, action))


class FlowDynamics(Dynamics):
    """Dynamics that integrate a velocity field from z_t at τ = 0 to z_{t+1} at τ = 1.

    Args:
        simnorm_dim (int): features per simplex group.
        solver (str): ``"euler"`` or ``"heun"``.
        substeps (int): K ≥ 1.
        checkpoint_substeps (bool): recompute the substeps in the backward pass, so that stored activations do not grow
            with K; gradients are identical. Defaults to ``False``.
    """

    def __init__(self, simnorm_dim: int, solver: str, substeps: int, checkpoint_substeps: bool = False) -> None:
        super().__init__()
        self.simnorm_dim = simnorm_dim
        self.solver = solver
        self.substeps = substeps
        self.checkpoint_substeps = checkpoint_substeps

    def forward(
        self,
        latent: Tensor,
        action: Tensor,
        task_embedding: Tensor | None = None,
        *,
        inline: bool = False,
    ) -> Tensor:
        """Next latent ``[..., D]``; ``inline`` disables checkpointing."""
        if inline or not (self.checkpoint_substeps and torch.is_grad_enabled()):
            return self.integrate(latent, action, task_embedding)
        # The backward pass must recompute with the parameters of *this* call, since a loss may swap in others before
        # then. They are passed as arguments so that autograd saves them.
        parameters = tensors_of(self)
        return checkpoint(self._integrate_with, parameters, latent, action, task_embedding, use_reentrant=False)

    def _integrate_with(
        self, parameters: dict[str, Tensor], latent: Tensor, action: Tensor, task_embedding: Tensor | None
    ) -> Tensor:
        return functional_call(self, parameters, (latent, action, task_embedding), {"inline": True})

    def integrate(self, latent: Tensor, action: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        """Solve the flow from τ = 0 to 1 in K uniform substeps."""
        raise NotImplementedError

    def flow_matching_error(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        tau: Tensor,
        task_embedding: Tensor | None = None,
    ) -> Tensor:
        """Squared flow-matching error ``[..., 1]``, averaged over features.

        Args:
            source (Tensor): z_s ``[..., D]``, the flow's start.
            target (Tensor): z̄ ``[..., D]``, its end; carries no gradient.
            action (Tensor): ``[..., A]``.
            tau (Tensor): flow time in [0, 1), ``[..., 1]``.
            task_embedding (Tensor, optional): ``[..., E]``.
        """
        raise NotImplementedError


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that ``module`` computes with now, by name: its parameters, or the tensors swapped in for them."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, part in module.named_modules()
        for name, tensor in {**part._parameters, **vars(part)}.items()
        if isinstance(tensor, Tensor)
    }


def count_parameters(module: nn.Module) -> int:
    """Number of scalar parameters."""
    return sum(p.numel() for p in module.parameters())
