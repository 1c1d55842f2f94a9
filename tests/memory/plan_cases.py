"""A run whose memory is mostly that of its updates, and budgets for it."""

from __future__ import annotations

from typing import Any

from training_cases import config

from pwm_torchrl.config import Config
from pwm_torchrl.envs.standard import EnvInfo
from pwm_torchrl.memory.budget import Budget, Candidate
from pwm_torchrl.memory.plan import Plan, make_plan
from pwm_torchrl.memory.predict import Choices

FACTS = EnvInfo("test", 3, 1, 30, 1, 2, False)
PLENTY = 2**45
#: Usable fraction of the host budget: the guard's threshold minus the margin.
USABLE = 0.85 * 0.9
AUTO = {
    "memory.kind": "auto",
    "training.replay_storage": "auto",
    "algorithm.model_batch": 16384,
    "algorithm.actor_batch": 4096,
    "algorithm.horizon": 3,
}


def automatic(changes: dict[str, Any] | None = None) -> Config:
    """A configuration that leaves every setting open."""
    return config({**AUTO, **(changes or {})})


def budgets(host: float = PLENTY, device: float | None = None) -> dict[str, Budget]:
    """Budgets in bytes."""
    places = {"host": host} if device is None else {"host": host, "device": device}
    return {place: Budget((Candidate(int(count), f"a test's {place}"),)) for place, count in places.items()}


def plan(
    host: float = PLENTY,
    device: float | None = None,
    changes: dict[str, Any] | None = None,
    given: Choices | None = None,
) -> Plan:
    """The plan of :func:`automatic` within budgets in bytes."""
    return make_plan(automatic(changes), FACTS, budgets(host, device), given)
