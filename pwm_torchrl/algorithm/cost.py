"""What an epoch's updates compute: evaluations of the dynamics network and floating-point operations.

Derived from :func:`~pwm_torchrl.algorithm.base.updates_of`, the losses' weights and the dynamics' kind. The compilation
of a run, the time limit of a job and the hours that a plan shows are all decided by these counts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from pwm_torchrl.algorithm.base import find_algorithm, updates_of
from pwm_torchrl.algorithm.build import Networks, compiles
from pwm_torchrl.config import Config
from pwm_torchrl.modules.dynamics import dynamics_class

__all__ = [
    "Evaluations",
    "evaluations_of",
    "evaluations_per_epoch",
    "operations_per_epoch",
    "pays_to_compile",
    "will_compile",
]

_FORWARD, _TRAINED = 2, 6  # operations per parameter and row, without and with a backward pass


class Evaluations(NamedTuple):
    """Evaluations of the dynamics network for each step of an update's rollout.

    Attributes:
        calls (int): calls, each on the whole batch.
        rows (int): rows that they compute for each row of the batch. One-step terms share the rollout's first call, so
            they add rows and no call.
    """

    calls: int
    rows: int


def evaluations_of(cfg: Config) -> dict[str, Evaluations]:
    """Evaluations in the updates that roll out, by the updates' names.

    The solver's evaluations are those of a transition. A model update rolls out the solver, its few-step map, or both,
    and adds one evaluation for flow matching and one for self-consistency (whose goal takes two more, without
    gradient). An actor update imagines with the few-step map if there is one. A step of a simulator counts as one.
    """
    if find_algorithm(cfg.algorithm.name).simulates:
        return {"actor": Evaluations(1, 1)}
    d, loss = cfg.model.dynamics, cfg.model.loss
    kind = dynamics_class(d.kind, d.parameterization)
    solver = kind.evaluations_with(d.solver, d.substeps)
    few_step = d.imagination_substeps if d.kind == "flow" else kind.imagination_substeps
    imagined = solver if few_step is None else few_step
    rolled_out = imagined if loss.few_step_rollout else solver
    beside = imagined if few_step is not None and loss.few_step_weight and not loss.few_step_rollout else 0
    calls = rolled_out + beside + bool(loss.flow_matching_weight) + bool(loss.self_consistency_weight)
    return {
        "model": Evaluations(calls, calls + rolled_out * bool(loss.one_step_weight)),
        "actor": Evaluations(imagined, imagined),
    }


def evaluations_per_epoch(cfg: Config) -> int:
    """Calls of the dynamics network in an epoch's updates."""
    updates = updates_of(cfg)
    each = evaluations_of(cfg).items()
    return sum(updates[name].per_epoch * updates[name].steps * made.calls for name, made in each if name in updates)


def operations_per_epoch(cfg: Config, networks: Networks) -> float:
    """Floating-point operations of an epoch's updates.

    A linear layer takes two operations per parameter and row in the forward pass, and twice as many in the backward
    pass. Recomputed substeps take a second forward pass.

    Args:
        cfg (Config): the run's configuration.
        networks (Networks): its networks, on any device, of which only the sizes are read.
    """
    model, evaluations = networks.model, evaluations_of(cfg)
    dynamics, reward, encoder = (
        (0, 0, 0) if model is None else map(_size, (model.dynamics, model.reward, model.encoder))
    )
    step = dynamics * (_TRAINED + (_FORWARD if cfg.model.dynamics.checkpoint_substeps else 0))
    one_step = bool(cfg.model.loss.one_step_weight)  # from every later observation, which is encoded with gradient
    total = 0.0
    for name, update in updates_of(cfg).items():
        if name == "model":  # slices: a transition and an encoding per step
            each = step * evaluations[name].rows + _TRAINED * reward * (1 + one_step)
            each += encoder * (_TRAINED if one_step else _FORWARD)
        elif name == "actor":  # rollouts: a transition and an action per step
            each = step * evaluations[name].rows + _TRAINED * (reward + _size(networks.actor))
        else:
            each = _TRAINED * _size(networks.critic)
        total += update.batch * update.per_epoch * update.steps * each
    return total


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


#: A run with at least this many evaluations of the dynamics network (each with its gradient) is compiled. Measured CPU
#: time on one thread with AVX-512: compiling saves 0.14 ms of 1.05 ms per evaluation at ``tiny``, and 1.1 ms of 21.5 ms
#: at ``5m`` (flow_v2, float32). The first compilation takes up to two minutes on a busy machine, and 2 s with a warm
#: cache.
COMPILE_FROM = 500_000


def pays_to_compile(cfg: Config) -> bool:
    """Whether ``algorithm.compile=auto`` compiles: only in a long run on a CPU, since the GPU was not measured."""
    if find_algorithm(cfg.algorithm.name).simulates:
        return False
    return cfg.device in ("auto", "cpu") and cfg.training.epochs * evaluations_per_epoch(cfg) >= COMPILE_FROM


def will_compile(cfg: Config) -> bool:
    """Whether a run compiles, with ``algorithm.compile=auto`` resolved, if a compiler is installed."""
    return compiles(cfg) or (str(cfg.algorithm.compile).lower() == "auto" and pays_to_compile(cfg))
