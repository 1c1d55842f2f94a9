"""What a plan may choose from for one run, and what each choice would need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pwm_torchrl.config import UPDATES, Config, trained_networks
from pwm_torchrl.data import replay_bytes
from pwm_torchrl.memory.predict import DEVICE, Choices, Prediction, framework_bytes, predict
from pwm_torchrl.memory.updates import Transient, UpdateTracer

#: Rows below which a micro-batch costs more time than recomputing a flow's substeps does.
EFFICIENT = {"model": 64, "actor": 32, "critic": 256}


class PlanSpace:
    """The choices that a configuration leaves open.

    Args:
        cfg (Config): the run's configuration.
        facts (EnvInfo): its environment's dimensions and number.
        compute (str): where the networks are, ``"host"`` or ``"device"``.
    """

    def __init__(self, cfg: Config, facts: Any, compute: str) -> None:
        self.cfg, self.facts, self.compute = cfg, facts, compute
        self._tracers: dict[bool, UpdateTracer] = {}
        self._framework: tuple[int, str] | None = None

    @property
    def written(self) -> Choices:
        """What the configuration says; the fastest way of the rest."""
        return self._choices(self.recomputes[0], self.storages[0], self._said)

    @property
    def updates(self) -> tuple[str, ...]:
        """Names of the updates that the run makes."""
        return trained_networks(self.cfg)

    def free(self, update: str) -> bool:
        """Whether an update's micro-batch is open."""
        return self._said(update) is None

    def _said(self, update: str) -> int | None:
        size: int | None = getattr(self.cfg.memory, UPDATES[update].micro_batch_key)
        return size

    def _choices(self, recompute: bool, storage: str, size: Callable[[str], int | None]) -> Choices:
        choices = Choices(checkpoint_substeps=recompute, replay_storage=storage)
        for update in self.updates:
            choices = choices.split(update, size(update))
        return choices

    @property
    def recomputes(self) -> list[bool]:
        """Whether to recompute substeps, the faster first; only a flow has any, and the configuration may have said."""
        said = self.cfg.model.dynamics.checkpoint_substeps
        if self.cfg.model.dynamics.kind != "flow":
            return [False]
        if self.cfg.memory.kind == "fixed":
            return [bool(said)]
        return [False, True] if said is None else [said]

    @property
    def storages(self) -> list[str]:
        """Where the replay may lie, the faster first; one that is large goes to disk."""
        t = self.cfg.training
        if self.cfg.mode != "online":
            return ["disk"]  # stored episodes are read where they lie
        if t.replay_storage != "auto":
            return [t.replay_storage]
        size = replay_bytes(self.facts.observation_dim, self.facts.action_dim, t.replay_capacity, self.facts.num_envs)
        if size > self.cfg.memory.disk_above_gb * 1e9:
            return ["disk"]
        return [*(["device"] if self.compute == DEVICE else []), "memory", "disk"]

    def tracer(self, recompute: bool) -> UpdateTracer:
        """Of the configuration with or without recomputed substeps."""
        if recompute not in self._tracers:
            cfg = copy.deepcopy(self.cfg)
            cfg.model.dynamics.checkpoint_substeps = recompute
            self._tracers[recompute] = UpdateTracer(cfg, self.facts)
        return self._tracers[recompute]

    def batch(self, update: str) -> int:
        """Rows of an update's batch."""
        return self.tracer(self.recomputes[0]).batches[update]

    def taken(self, update: str, choices: Choices) -> Transient:
        """What an update takes beside what persists."""
        return self.tracer(choices.checkpoint_substeps).transient(update, choices.micro_batch(update))

    def predict(self, choices: Choices) -> Prediction:
        """What a run with these choices needs; all predictions of a plan begin from the same base."""
        if self._framework is None:
            self.tracer(choices.checkpoint_substeps).persistent  # noqa: B018 - what tracing imports belongs to the base
            self._framework = framework_bytes()
        tracer = self.tracer(choices.checkpoint_substeps)
        return predict(self.cfg, self.facts, choices, self.compute, tracer, self._framework)

    def needed(self, choices: Choices) -> int:
        """Bytes in all where the networks are."""
        return self.predict(choices).total(self.compute)

    @property
    def least(self) -> Choices:
        """The choices that need the least."""
        return self._choices(self.recomputes[-1], self.storages[-1], lambda update: self._said(update) or 1)

    def kept(self, given: Choices) -> Choices:
        """Earlier choices, as far as they are still open."""
        return self._choices(
            _one_of(given.checkpoint_substeps, self.recomputes),
            _one_of(given.replay_storage, self.storages),
            lambda update: self._said(update) or given.micro_batch(update),
        )


def _one_of(wish: Any, options: list[Any]) -> Any:
    return wish if wish in options else options[0]


def halvings(batch: int) -> list[int]:
    """A batch, its half, ... down to 1."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes
