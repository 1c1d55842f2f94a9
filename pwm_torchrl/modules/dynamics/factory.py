"""Builds dynamics from their name and options, at equal parameter count."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics.base import Dynamics, MLPDynamics
from pwm_torchrl.modules.dynamics.flows import ResidualDynamics, ResidualEndpointFlow, SimNormVelocityFlow, TangentFlow
from pwm_torchrl.user_code import locate

KINDS = ("mlp", "residual", "flow")
PARAMETERIZATIONS = ("residual_endpoint", "tangent", "simnorm_velocity")
SOLVERS = ("euler", "heun")

#: The class of each kind, and of each parameterisation of a flow.
CLASSES: dict[tuple[str, str | None], type[Dynamics]] = {
    ("mlp", None): MLPDynamics,
    ("residual", None): ResidualDynamics,
    ("flow", "residual_endpoint"): ResidualEndpointFlow,
    ("flow", "tangent"): TangentFlow,
    ("flow", "simnorm_velocity"): SimNormVelocityFlow,
}
#: Arguments of every kind, including custom ones.
COMMON = ("latent_dim", "action_dim", "task_dim", "units", "simnorm_dim")


def options_of(kind: str, parameterization: str | None = None) -> list[str]:
    """Options of :func:`make_dynamics` that a kind takes in addition to the common ones, from its class's signature."""
    own = [name for name in inspect.signature(CLASSES[kind, parameterization]).parameters if name not in COMMON]
    return ["parameterization", *own] if parameterization is not None else own


def _choice(key: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ConfigurationError(f"model.dynamics.{key}={value!r} is not one of {', '.join(accepted)}.")


def find_dynamics(path: str) -> type[Dynamics]:
    """A dynamics class by its dotted path, which may be in the working directory.

    Raises:
        ConfigurationError: if there is no such class, or it is not a :class:`Dynamics`.
    """
    found = locate("model.dynamics.kind", path)
    if not (isinstance(found, type) and issubclass(found, Dynamics)):
        raise ConfigurationError(
            f"model.dynamics.kind={path!r} is not a subclass of pwm_torchrl.modules.Dynamics, whose forward maps "
            "latent, "
            "action and task embedding to the next latent"
        )
    return found


def dynamics_class(kind: str, parameterization: str) -> type[Dynamics]:
    """The class of a kind, which may be a dotted path; ``parameterization`` is used only for flows."""
    if "." in kind:
        return find_dynamics(kind)
    return CLASSES[kind, parameterization if kind == "flow" else None]


def make_dynamics(
    kind: str,
    latent_dim: int,
    action_dim: int,
    task_dim: int,
    units: Sequence[int],
    simnorm_dim: int = 8,
    parameterization: str = "residual_endpoint",
    solver: str = "heun",
    substeps: int = 4,
    condition_on_start: bool = False,
    time_features: int = 0,
    condition_on_step_size: bool = False,
    checkpoint_substeps: bool = False,
    imagination_substeps: int | None = None,
    match_parameters: bool = True,
) -> Dynamics:
    """Build latent dynamics.

    ``residual`` and ``flow`` get hidden widths at which they have about as many parameters as ``mlp`` with ``units``,
    for a fair comparison of kinds (``simnorm_velocity`` keeps ``units``, as its checkpoints do).

    Args:
        kind (str): ``"mlp"``, ``"residual"`` or ``"flow"``; or the dotted path of a custom :class:`Dynamics`, which is
            called with ``latent_dim, action_dim, task_dim, units, simnorm_dim``.
        latent_dim (int): ``D``.
        action_dim (int): ``A``.
        task_dim (int): E, 0 without tasks.
        units (sequence of int): hidden widths of the MLP dynamics.
        simnorm_dim (int): features per simplex group. Defaults to ``8``.
        parameterization (str): flows only: ``"residual_endpoint"``, ``"tangent"`` or ``"simnorm_velocity"``.
            Defaults to ``"residual_endpoint"``.
        solver (str): flows only: ``"euler"`` or ``"heun"``. Defaults to ``"heun"``.
        substeps (int): flows only: K ≥ 1. Defaults to ``4``.
        condition_on_start (bool): flows only: add z_t to the network's input. Defaults to ``False``.
        time_features (int): flows only: sine/cosine pairs of τ to add to its input. Defaults to ``0``.
        condition_on_step_size (bool): residual-endpoint flows only: add the step size to its input. Defaults to
            ``False``.
        checkpoint_substeps (bool): flows only: recompute substeps in the backward pass. Defaults to ``False``.
        imagination_substeps (int, optional): residual-endpoint flows only: Euler substeps of imagination. Defaults to
            ``None``: imagination uses ``solver``.
        match_parameters (bool): adjust hidden widths as described. Defaults to ``True``.

    Raises:
        ConfigurationError: for an unknown name, ``substeps < 1`` or an option that the parameterisation lacks.
    """
    if "." in kind:
        return find_dynamics(kind)(latent_dim, action_dim, task_dim, units, simnorm_dim)
    _choice("kind", kind, KINDS)
    base = latent_dim + task_dim + action_dim
    if kind == "mlp":
        return MLPDynamics(latent_dim, action_dim, task_dim, units, simnorm_dim)

    sizes = [base, *units, latent_dim]
    budget = sum(i * o + 3 * o for i, o in zip(sizes[:-1], sizes[1:], strict=True))

    def widths(in_features: int) -> list[int]:
        if not match_parameters:
            return list(units)
        return matched_units(units, in_features, latent_dim, budget)

    if kind == "residual":
        return ResidualDynamics(latent_dim, action_dim, task_dim, widths(base), simnorm_dim)

    _choice("parameterization", parameterization, PARAMETERIZATIONS)
    _choice("solver", solver, SOLVERS)
    if substeps < 1:
        raise ConfigurationError(f"model.dynamics.substeps={substeps} must be at least 1.")
    if condition_on_step_size and parameterization != "residual_endpoint":
        raise ConfigurationError(
            f"model.dynamics.condition_on_step_size needs parameterization=residual_endpoint, not {parameterization}."
        )
    if imagination_substeps is not None and (imagination_substeps < 1 or parameterization != "residual_endpoint"):
        raise ConfigurationError(
            f"model.dynamics.imagination_substeps={imagination_substeps} must be at least 1, and needs "
            f"parameterization=residual_endpoint, not {parameterization}."
        )
    if parameterization == "residual_endpoint":
        in_features = ResidualEndpointFlow.input_features(
            base, latent_dim, condition_on_start, time_features, condition_on_step_size
        )
        return ResidualEndpointFlow(
            latent_dim,
            action_dim,
            task_dim,
            widths(in_features),
            simnorm_dim,
            solver,
            substeps,
            condition_on_start,
            time_features,
            condition_on_step_size,
            checkpoint_substeps,
            imagination_substeps,
        )
    if parameterization == "tangent":
        in_features = base + latent_dim * condition_on_start + 1 + 2 * time_features
        return TangentFlow(
            latent_dim,
            action_dim,
            task_dim,
            widths(in_features),
            simnorm_dim,
            solver,
            substeps,
            condition_on_start,
            time_features,
            checkpoint_substeps,
        )
    if condition_on_start or time_features:
        raise ConfigurationError(
            "model.dynamics.parameterization=simnorm_velocity takes neither condition_on_start nor time_features: "
            "it reproduces a published network."
        )
    return SimNormVelocityFlow(
        latent_dim, action_dim, task_dim, units, simnorm_dim, solver, substeps, checkpoint_substeps
    )


def matched_units(units: Sequence[int], in_features: int, out_features: int, budget: int) -> list[int]:
    """Scaled hidden widths for which a :func:`normed_mlp` with a plain last layer has about ``budget`` parameters.

    Used to compare dynamics at equal parameter count (within 1 % at the sizes shipped): a network with a larger input
    gets smaller widths.

    Args:
        units (sequence of int): hidden widths of the reference network.
        in_features (int): input width of the network to size.
        out_features (int): output width.
        budget (int): number of parameters of the reference network.
    """

    def parameters(widths: Sequence[int]) -> int:
        sizes = [in_features, *widths]
        hidden = sum(i * o + 3 * o for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        return hidden + sizes[-1] * out_features + out_features

    def scaled(first: int) -> list[int]:
        return [max(1, round(first * u / units[0])) for u in units]

    if not units:
        return []
    low, high = 1, 4 * units[0]
    while low < high:
        middle = (low + high) // 2
        if parameters(scaled(middle)) < budget:
            low = middle + 1
        else:
            high = middle
    return min((scaled(low), scaled(max(1, low - 1))), key=lambda w: abs(parameters(w) - budget))
