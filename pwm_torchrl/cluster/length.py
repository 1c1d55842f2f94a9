"""How long a run may take: a guess for a job's time limit, from arithmetic, generous and capped by the profile.

A job that reaches its limit saves and comes back, so that a guess that is too short costs a restart and one that is too
long costs queue priority; nothing else depends on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pwm_torchrl.config import UPDATES, Config, trained_networks

if TYPE_CHECKING:
    from pwm_torchrl.memory.plan import Plan

#: Floating-point operations per second that small matrix products reach: a guess, per CPU core and per GPU.
CPU_FLOPS, GPU_FLOPS = 5e9, 8e12
#: Seconds that an update takes beside its arithmetic: launching kernels, per network evaluation of the rollout.
OVERHEAD_S = 4e-4
#: Agent steps per second of an environment on a core, with TorchRL's overhead: a slow simulator's.
STEPS_PER_S = 500.0
#: A guess is multiplied by this, and start-up is added.
SAFETY, START_UP_MIN, LEAST_MIN = 3.0, 15, 30


def estimated_minutes(cfg: Config, plan: Plan, cpus: int) -> int:
    """A time limit for the whole run, in minutes."""
    a, t = cfg.algorithm, cfg.training
    parameters = sum(item.bytes for item in plan.prediction.items if item.what == "parameters") / 4
    dynamics = cfg.model.dynamics
    evaluations = 1
    if dynamics.kind == "flow":
        evaluations = dynamics.substeps if dynamics.solver == "euler" else 2 * dynamics.substeps - 1
    if plan.choices.checkpoint_substeps:
        evaluations += evaluations
    made = {name: UPDATES[name].per_epoch(a) for name in trained_networks(cfg)}
    unrolled = {name: made[name] for name in made if name != "critic"}
    # Forward and backward: six operations per parameter and row.
    rows = sum(count * UPDATES[name].batch(a) for name, count in unrolled.items())
    flops = 6 * parameters * rows * a.horizon * evaluations
    on_gpu = plan.prediction.compute == "device"
    arithmetic = flops / (GPU_FLOPS if on_gpu else CPU_FLOPS * cpus)
    calls = sum(unrolled.values()) * a.horizon * (evaluations + 2) * 3
    critics = made.get("critic", 0) * 6
    envs = int(cfg.env.get("num_envs", 1)) if cfg.mode == "online" else 0
    collection = envs * (a.collect_steps or a.horizon) / STEPS_PER_S
    epoch_s = arithmetic + (calls + critics) * OVERHEAD_S + collection
    evaluation_s = int(cfg.env.get("episode_length") or 1000) * t.eval_episodes / STEPS_PER_S
    if cfg.mode == "pretrain":
        evaluation_s = 0.2 * epoch_s  # held-out slices, without gradients
    evaluated = t.epochs / t.eval_every if t.eval_every else 1
    minutes = SAFETY * (t.epochs * epoch_s + evaluated * evaluation_s) / 60 + START_UP_MIN
    return max(LEAST_MIN, math.ceil(minutes / 15) * 15)
