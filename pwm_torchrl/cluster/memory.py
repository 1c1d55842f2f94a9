"""The next memory plan after one that was too small: more memory up to the profile's ceiling, then smaller parts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_torchrl.config import Config
from pwm_torchrl.data.files import write_durably
from pwm_torchrl.errors import ConfigurationError

PLAN_FILE = "memory_plan.json"
#: Factor of each larger request.
GROWTH = 1.5
MIB = 2**20


@dataclass(frozen=True)
class NextPlan:
    """What changes.

    Attributes:
        mem_mb (int): host memory to ask for, MiB.
        choices (dict): of the plan that the next attempt starts from; empty if they stay.
        change (str): in words.
    """

    mem_mb: int
    choices: dict[str, Any]
    change: str


def next_plan(run_dir: Path, cfg: Config, mem_mb: int) -> NextPlan | None:
    """What to try after memory ran out; ``None`` if nothing is left.

    More memory comes first, since it costs no speed. At the ceiling, updates on the host are split further, and then
    the replay goes to disk. What the configuration sets itself stays.

    Args:
        run_dir (Path): with the plan of the attempt that died.
        cfg (Config): the run's configuration.
        mem_mb (int): host memory that it had, MiB.
    """
    ceiling = mem_mb if cfg.cluster.host_gb is None else int(cfg.cluster.host_gb * 1e9 / MIB)
    if mem_mb < ceiling:
        more = min(ceiling, math.ceil(mem_mb * GROWTH))
        return NextPlan(more, {}, f"--mem {mem_mb} -> {more} MiB")
    plan = read_plan(run_dir)
    if plan is None or cfg.memory.kind == "fixed":
        return None
    choices = dict(plan["choices"])
    if plan["prediction"]["compute"] == "host":
        sizes = {key: _half(choices[key], batch) for key, batch in batches(cfg).items() if _open(cfg, key)}
        if any(size != (choices[key] or batches(cfg)[key]) for key, size in sizes.items()):
            parts = ", ".join(f"{key.removesuffix('_micro_batch')} {size}" for key, size in sizes.items())
            return NextPlan(mem_mb, {**choices, **sizes}, f"smaller micro-batches: {parts}")
    if choices["replay_storage"] == "memory" and cfg.training.replay_storage == "auto":
        return NextPlan(mem_mb, {**choices, "replay_storage": "disk"}, "the replay goes to disk")
    return None


def apply_plan(run_dir: Path, plan: NextPlan) -> None:
    """Let the next attempt start from a plan's choices."""
    if plan.choices:
        saved = read_plan(run_dir) or {}
        write_durably(run_dir / PLAN_FILE, json.dumps({**saved, "choices": plan.choices}, indent=2) + "\n")


def read_plan(run_dir: Path) -> dict[str, Any] | None:
    """The last attempt's plan, ``None`` without one.

    Raises:
        ConfigurationError: if the file is not one that this version wrote.
    """
    file = run_dir / PLAN_FILE
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content["choices"], content["prediction"]["compute"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{file} does not hold a memory plan of this version ({error}); delete it.") from error
    return content


def batches(cfg: Config) -> dict[str, int]:
    """Rows of each update's batch, by the key of its micro-batch."""
    a = cfg.algorithm
    states = a.actor_batch * a.horizon
    return {
        "model_micro_batch": a.model_batch,
        "actor_micro_batch": a.actor_batch,
        "critic_micro_batch": -(-states // a.critic_minibatches),
    }


def _open(cfg: Config, key: str) -> bool:
    return getattr(cfg.memory, key) is None


def _half(size: int | None, batch: int) -> int:
    return max(1, -(-(size or batch) // 2))
