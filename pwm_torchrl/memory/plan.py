"""From a prediction and a budget to choices: the fastest way to run that fits, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pwm_torchrl.config import UPDATES, Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.budget import Budget
from pwm_torchrl.memory.neighbours import Alternative, cheaper_plan, larger_plan
from pwm_torchrl.memory.predict import DEVICE, HOST, Choices, Prediction
from pwm_torchrl.memory.space import EFFICIENT, PlanSpace, halvings
from pwm_torchrl.memory.units import MIB, format_bytes

#: By how much host memory two processes of the same run may differ before they build anything.
SPREAD = 16 * MIB


@dataclass(frozen=True)
class Plan:
    """Choices, what they need and what there is.

    Attributes:
        choices (Choices): what the run does.
        prediction (Prediction): what it will need.
        budgets (dict of Budget): by place, ``"host"`` and, with a GPU, ``"device"``.
        margin (float): share of each budget's reach that is left free.
        stop_at (float): how far a run's own guard lets it reach into the host's budget, a share of it.
        automatic (bool): whether the choices were made here; else they were given.
        larger (Alternative, optional): the next plan that needs more and is faster.
        cheaper (Alternative, optional): the next plan that needs less.
    """

    choices: Choices
    prediction: Prediction
    budgets: dict[str, Budget]
    margin: float
    stop_at: float
    automatic: bool
    larger: Alternative | None = None
    cheaper: Alternative | None = None

    def usable(self, place: str) -> int:
        """Bytes of a budget that a plan may use: what is below the guard's threshold, without the margin."""
        return int(self.budgets[place].bytes * self.share(place))

    def share(self, place: str) -> float:
        """The same as a share of the budget."""
        return (self.stop_at if place == HOST else 1.0) * (1 - self.margin)

    def shortages(self) -> list[str]:
        """A sentence for each budget that the run does not fit into."""
        return [
            f"{place} memory: {format_bytes(self.prediction.total(place))} needed, {format_bytes(self.usable(place))} "
            f"usable ({self.share(place):.0%} of {format_bytes(budget.bytes)}, {budget.source})"
            for place, budget in self.budgets.items()
            if self.lacks(place)
        ]

    def lacks(self, place: str) -> bool:
        """Whether the run does not fit into a budget."""
        return self.prediction.total(place) > self.usable(place)

    def applied(self, cfg: Config) -> Config:
        """A copy of the configuration with the choices written in."""
        cfg = copy.deepcopy(cfg)
        for name in (update.micro_batch_key for update in UPDATES.values()):
            setattr(cfg.memory, name, getattr(self.choices, name))
        cfg.model.dynamics.checkpoint_substeps = self.choices.checkpoint_substeps
        cfg.training.replay_storage = self.choices.replay_storage
        return cfg

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``memory_plan.json``."""
        return {
            "choices": asdict(self.choices),
            "prediction": self.prediction.as_dict(),
            "budgets": {p: {"bytes": b.bytes, "source": b.source} for p, b in self.budgets.items()},
            "margin": self.margin,
            "stop_at": self.stop_at,
            "automatic": self.automatic,
            "returns_freed_memory": self.prediction.returns_freed_memory,
            "larger": None if self.larger is None else asdict(self.larger),
            "cheaper": None if self.cheaper is None else asdict(self.cheaper),
        }


def make_plan(cfg: Config, facts: Any, budgets: dict[str, Budget], given: Choices | None = None) -> Plan:
    """Choose how to run within budgets; what the configuration sets is kept.

    Args:
        cfg (Config): the run's configuration. With ``memory.kind="fixed"`` only the replay's storage is chosen, if that
            is ``"auto"``.
        facts (EnvInfo): its environment's dimensions and number.
        budgets (dict of Budget): ``"host"``, and ``"device"`` if the networks are on a GPU.
        given (Choices, optional): choices of an earlier plan, to be kept if they still fit, but for those that the
            configuration sets by now. Defaults to ``None``.

    Raises:
        ConfigurationError: if nothing fits; it names the smallest budget that would do.
    """
    return _Planner(cfg, facts, budgets).plan(given)


class _Planner:
    def __init__(self, cfg: Config, facts: Any, budgets: dict[str, Budget]) -> None:
        self.cfg, self.budgets = cfg, budgets
        self.space = PlanSpace(cfg, facts, DEVICE if DEVICE in budgets else HOST)

    def build(self, choices: Choices) -> Plan:
        memory = self.cfg.memory
        prediction = self.space.predict(choices)
        return Plan(choices, prediction, self.budgets, memory.margin, memory.stop_at, memory.kind != "fixed")

    def plan(self, given: Choices | None) -> Plan:
        if self.cfg.memory.kind == "fixed":
            return self.with_storage(self.space.written)
        if given is not None:
            kept = self.build(self.space.kept(given))
            if not kept.shortages():
                return self.with_neighbours(kept)
        for choices in self.candidates():
            plan = self.with_storage(choices)
            if not plan.shortages():
                return self.with_neighbours(plan)
        raise self.impossible()

    def candidates(self) -> Iterator[Choices]:
        """From fast to small: large micro-batches, then recomputed substeps, then small micro-batches."""
        for recompute in self.space.recomputes:
            yield from self.sized(recompute, EFFICIENT)
        yield from self.sized(self.space.recomputes[-1], dict.fromkeys(self.space.updates, 1))

    def sized(self, recompute: bool, smallest: dict[str, int]) -> Iterator[Choices]:
        """The largest micro-batches that fit, none below ``smallest``, if there are such."""
        chosen = replace(self.space.written, checkpoint_substeps=recompute)
        limit = self.limit(chosen)
        for update in self.space.updates:
            if not self.space.free(update):
                continue
            size = self.largest(chosen, update, limit, smallest[update])
            if size is None:
                return
            chosen = chosen.split(update, None if size == self.space.batch(update) else size)
        yield chosen

    def limit(self, choices: Choices) -> int:
        """Bytes that an update may take where the networks are, the replay moved out of the way if that is allowed."""
        plan = self.build(replace(choices, replay_storage=self.space.storages[-1]))
        compute = self.space.compute
        return plan.usable(compute) - sum(
            item.bytes for item in plan.prediction.items if item.place == compute and not item.shared
        )

    def largest(self, choices: Choices, update: str, limit: int, smallest: int) -> int | None:
        """The largest micro-batch, by halving, whose update stays within ``limit``."""
        batch, *sizes = halvings(self.space.batch(update))
        whole = self.space.taken(update, choices)
        if whole.peak <= limit:
            return batch
        # Activations shrink with the micro-batch, which says where to look; a trace decides.
        rest = whole.gradients + whole.data
        sizes = [size for size in sizes if size >= smallest]
        likely = [size for size in sizes if rest + whole.activations * size / batch <= 1.05 * limit] or sizes[-1:]
        fitting = (s for s in likely if self.space.taken(update, choices.split(update, s)).peak <= limit)
        return next(fitting, None)

    def with_storage(self, choices: Choices) -> Plan:
        """The nearest replay that fits: on the GPU, else in RAM, else on disk."""
        plans = [self.build(replace(choices, replay_storage=storage)) for storage in self.space.storages]
        return next((plan for plan in plans if not plan.shortages()), plans[-1])

    def with_neighbours(self, plan: Plan) -> Plan:
        larger, cheaper = larger_plan(self.space, plan.choices), cheaper_plan(self.space, plan.choices)
        return replace(plan, larger=larger, cheaper=cheaper)

    def impossible(self) -> ConfigurationError:
        """What the least plan would need."""
        plan = self.build(self.space.least)
        needed = [self.needed(plan, place) for place in self.budgets if plan.lacks(place)]
        capacity = f"less than training.replay_capacity={self.cfg.training.replay_capacity}"
        on_disk = self.space.storages[-1] == "disk"
        remedies = "a smaller size" if on_disk else f"a smaller size, training.replay_storage=disk or {capacity}"
        return ConfigurationError(
            f"{self.cfg.model.name} {self.cfg.size.name} does not fit, even in the smallest micro-batches: "
            f"{'; '.join(plan.shortages())}. The smallest budget that would work: {', '.join(needed)}. Give it more, "
            f"or choose {remedies}."
        )

    def needed(self, plan: Plan, place: str) -> str:
        """The smallest budget, and the key that sets it."""
        least = plan.prediction.total(place) / plan.share(place) + (SPREAD if place == HOST else 0)
        group = "cluster" if place == HOST and self.budgets[place].source.startswith("cluster=") else "memory"
        gigabytes = -(-least // 1e7) / 100  # rounded up to what the configuration takes
        return f"{place} memory of {format_bytes(least)} ({group}.{place}_gb={gigabytes:g})"
