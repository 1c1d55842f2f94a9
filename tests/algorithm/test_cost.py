"""What an epoch computes: by hand for small runs, and the same for plan, job and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training_cases import config

from pwm_torchrl.algorithm.base import find_algorithm
from pwm_torchrl.algorithm.build import Facts
from pwm_torchrl.algorithm.cost import (
    COMPILE_FROM,
    evaluations_of,
    evaluations_per_epoch,
    operations_per_epoch,
    pays_to_compile,
    will_compile,
)
from pwm_torchrl.cluster.resources import CPU_FLOPS, LAUNCH_OVERHEAD_S, SAFETY, estimated_minutes
from pwm_torchrl.config import Config
from pwm_torchrl.envs.standard import EnvInfo
from pwm_torchrl.memory.budget import Budget, Candidate
from pwm_torchrl.memory.plan import Plan, make_plan
from pwm_torchrl.report.estimate import operations

FACTS = EnvInfo("test", 3, 1, 30, 1, 2, False)
HEUN = {"model.dynamics.solver": "heun", "model.dynamics.substeps": 4}  # seven evaluations
FEW = {**HEUN, "model.dynamics.imagination_substeps": 2, "model.dynamics.condition_on_step_size": True}
PWM = {
    "algorithm.name": "pwm",
    "algorithm.slice_steps": 5,
    "algorithm.critic_passes": 8,
    "algorithm.critic_minibatches": 4,
    "model.loss.one_step_weight": 1.0,
}


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def planned(cfg: Config) -> Plan:
    return make_plan(cfg, FACTS, {"host": Budget((Candidate(2**45, "a test"),))})


@pytest.mark.parametrize(
    ("changes", "model", "actor"),
    [
        ({"model.dynamics.kind": "mlp"}, (1, 1), (1, 1)),
        ({"model.dynamics.kind": "mlp", "model.loss.one_step_weight": 1.0}, (1, 2), (1, 1)),
        (HEUN, (7, 7), (7, 7)),
        ({**HEUN, "model.loss.flow_matching_weight": 0.1}, (8, 8), (7, 7)),
        (FEW, (7 + 2, 7 + 2), (2, 2)),
        ({**FEW, "model.loss.few_step_weight": 0.0}, (7, 7), (2, 2)),
        (
            {**FEW, "model.loss.few_step_rollout": True, "model.loss.flow_matching_weight": 1.0},
            (2 + 1, 2 + 1),
            (2, 2),
        ),
        ({"model.dynamics.kind": "pwm_torchrl.modules.MLPDynamics"}, (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_evaluations_of_the_dynamics(changes: dict[str, Any], model: tuple[int, int], actor: tuple[int, int]) -> None:
    cfg = config(changes)
    assert evaluations_of(cfg) == {"model": model, "actor": actor}
    a = cfg.algorithm
    expected = a.horizon * (a.model_updates * model[0] + a.actor_updates * actor[0])
    assert evaluations_per_epoch(cfg) == expected
    for epochs in (-(-COMPILE_FROM // expected), COMPILE_FROM // (expected + 1)):
        cfg.training.epochs = epochs
        assert pays_to_compile(cfg) is will_compile(cfg) is (epochs * expected >= COMPILE_FROM)
    cfg.algorithm.compile = False
    assert not will_compile(cfg)


def test_operations_written_out() -> None:
    cfg = config(PWM)
    networks = find_algorithm("pwm").build_networks(cfg, Facts(3, 1, False))
    model, a = networks.model, cfg.algorithm
    sets = round(a.updates_per_step * a.steps_per_env * 2)
    solver = 3  # flow_v1: two Heun substeps
    learned = 6 * (2 * solver * size(model.dynamics) + 2 * size(model.reward) + size(model.encoder))
    imagined = 6 * (solver * size(model.dynamics) + size(model.reward) + size(networks.actor))
    expected = sets * (
        a.model_batch * 5 * learned + a.actor_batch * a.horizon * imagined + a.critic_batch * 6 * size(networks.critic)
    )
    assert operations_per_epoch(cfg, networks) == expected


@pytest.mark.parametrize("changes", [{}, PWM, FEW], ids=str)
def test_report_and_job_have_the_same_number(changes: dict[str, Any]) -> None:
    cfg = config(changes)
    networks = find_algorithm(cfg.algorithm.name).build_networks(cfg, FACTS, torch.device("cpu"))
    prediction = planned(cfg).prediction
    assert prediction.operations == operations(cfg, FACTS) == operations_per_epoch(cfg, networks) > 0
    assert prediction.evaluations == evaluations_per_epoch(cfg)


def test_a_job_that_imagines_with_a_few_step_map_is_shorter() -> None:
    """Its time limit depends on the evaluations of imagination, in arithmetic and in overhead."""
    runs = [config({**HEUN, "algorithm.actor_updates": 64, "training.epochs": 100_000}) for _ in range(2)]
    runs[1].model.dynamics.imagination_substeps = 1
    runs[1].model.loss.few_step_weight = 0.0
    whole, few = (planned(cfg).prediction for cfg in runs)
    steps = 64 * runs[0].algorithm.horizon
    assert whole.evaluations - few.evaluations == steps * (7 - 1)
    saved_s = (whole.operations - few.operations) / (CPU_FLOPS * 2) + steps * (7 - 1) * 3 * LAUNCH_OVERHEAD_S
    minutes = [estimated_minutes(cfg, planned(cfg), 2) for cfg in runs]
    assert minutes[0] - minutes[1] == pytest.approx(SAFETY * 100_000 * saved_s / 60, abs=15)
