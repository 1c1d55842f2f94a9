"""A job on this machine whose memory ran out: the next plan, as a SLURM job would get it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.deaths import Restart
from pwm_torchrl.cluster.memory import apply_plan, next_plan
from pwm_torchrl.cluster.reasons import MEMORY, REQUEUE
from pwm_torchrl.cluster.record import note_restart, restarts_of
from pwm_torchrl.config import Config
from pwm_torchrl.training.claims import newest_claim


def thriftier_plan(run_dir: Path, cfg: Config, outcome: Mapping[str, Any]) -> str | None:
    """Let the next attempt start from a plan that needs less; there is no more memory to ask for here.

    Args:
        run_dir (Path): the run's directory.
        cfg (Config): its configuration.
        outcome (dict): of the attempt's job.

    Returns:
        str, optional: what changes, in words; ``None`` if the attempt did not end for memory or nothing is left.
    """
    if outcome.get("status") != MEMORY:
        return None
    before = restarts_of(run_dir)
    if sum(each.reason == MEMORY for each in before) >= cfg.cluster.max_memory_restarts:
        return None
    plan = next_plan(run_dir, cfg, 0 if cfg.cluster.host_gb is None else int(cfg.cluster.host_gb * 1e9 / 2**20))
    if plan is None:
        return None
    apply_plan(run_dir, plan)
    claim = newest_claim(run_dir)
    attempt = 0 if claim is None else claim.attempt
    note_restart(run_dir, attempt, Restart(MEMORY, progressed=True), REQUEUE, plan.change, None)
    return plan.change
