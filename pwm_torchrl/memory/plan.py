"""The plan by which a run fits its budget: what may be chosen, what is chosen, and the table that explains it."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pwm_torchrl.config import UPDATES, Config, trained_networks
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.budget import Budget, Candidate, device_budget, host_budget
from pwm_torchrl.memory.predict import (
    CACHE,
    DEVICE,
    DISK,
    FRAMEWORK_ESTIMATE,
    HOST,
    Choices,
    Prediction,
    framework_bytes,
    predict,
)
from pwm_torchrl.memory.readings import MIB, format_bytes
from pwm_torchrl.memory.storage import replay_bytes
from pwm_torchrl.memory.trace import Transient, UpdateTracer


def budgets(cfg: Config, device: str | None) -> dict[str, Budget]:
    """Budgets by place, where the run is about to start.

    Args:
        cfg (Config): its ``memory.host_gb`` and ``memory.device_gb`` bound what the machine offers.
        device (str, optional): the CUDA device of the networks, or ``None`` on the CPU.

    Raises:
        ConfigurationError: if a variable of SLURM that tells memory makes no sense.
    """
    try:
        found = {HOST: host_budget().candidates}
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if device is not None:
        here = device_budget(device=device)
        found[DEVICE] = () if here is None else here.candidates
    return {place: _bounded(cfg, place, candidates) for place, candidates in found.items()}


def profile_budgets(cfg: Config) -> dict[str, Budget]:
    """Budgets by place of the nodes that a cluster profile describes, which need not be this machine.

    Raises:
        ConfigurationError: if the profile does not say what its nodes have, has no GPU that the run asks for, or names
            an unknown one.
    """
    profile = cfg.cluster
    if cfg.device.startswith("cuda") and profile.gpu is None:
        raise ConfigurationError(
            f"device={cfg.device} needs a GPU, and cluster={profile.name} has none; set cluster.gpu, or choose another "
            "cluster."
        )
    if profile.host_gb is None and profile.mem_gb is None and cfg.memory.host_gb is None:
        raise ConfigurationError(
            f"cluster={profile.name} does not say how much host memory its nodes have; set cluster.host_gb, "
            "cluster.mem_gb or memory.host_gb."
        )
    host = [] if profile.host_gb is None else [Candidate(int(profile.host_gb * 1e9), f"cluster={profile.name}")]
    if profile.mem_gb is not None:
        host.append(Candidate(int(profile.mem_gb * 2**30), "cluster.mem_gb"))
    found: dict[str, tuple[Candidate, ...]] = {HOST: tuple(host)}
    if profile.gpu is not None and cfg.device != "cpu":
        try:
            gpu = device_budget(profile.gpu)
        except ValueError as error:
            raise ConfigurationError(f"cluster.gpu={profile.gpu}: {error}") from error
        found[DEVICE] = () if gpu is None else gpu.candidates
    return {place: _bounded(cfg, place, candidates) for place, candidates in found.items()}


def _bounded(cfg: Config, place: str, candidates: tuple[Candidate, ...]) -> Budget:
    given = cfg.memory.host_gb if place == HOST else cfg.memory.device_gb
    if given is not None:
        candidates = (*candidates, Candidate(int(given * 1e9), f"memory.{place}_gb"))
    return Budget(candidates)


#: Rows below which a micro-batch costs more time than recomputing a flow's substeps does.
EFFICIENT = {"model": 64, "actor": 32, "critic": 256}


class PlanSpace:
    """The choices that a configuration leaves open.

    Args:
        cfg (Config): the run's configuration.
        facts (EnvInfo): its environment's dimensions and number.
        compute (str): where the networks are, ``"host"`` or ``"device"``.
        framework (tuple, optional): what a process holds before it builds anything, in bytes, and how that is known.
            Defaults to ``None``: what this process holds.
    """

    def __init__(self, cfg: Config, facts: Any, compute: str, framework: tuple[int, str] | None = None) -> None:
        self.cfg, self.facts, self.compute = cfg, facts, compute
        self._tracers: dict[bool, UpdateTracer] = {}
        self._framework = framework

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


_WHERE = {"device": "the replay on the GPU", "memory": "the replay in host memory", "disk": "the replay on disk"}


@dataclass(frozen=True)
class Alternative:
    """Another plan: what differs, and what it would need where the networks are."""

    change: str
    bytes: int


def larger_plan(space: PlanSpace, choices: Choices) -> Alternative | None:
    """One step back towards the fastest way; ``None`` if there is none that needs more."""
    needed = space.needed(choices)
    found = (Alternative(change, space.needed(other)) for other, change in _larger(space, choices))
    return next((other for other in found if other.bytes > needed), None)


def cheaper_plan(space: PlanSpace, choices: Choices) -> Alternative | None:
    """One step further, the fastest of those that need less; ``None`` if there is none."""
    needed = space.needed(choices)
    found = (Alternative(change, space.needed(other)) for other, change in _cheaper(space, choices))
    return next((other for other in found if other.bytes < needed), None)


def _larger(space: PlanSpace, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """The update that is split the most in larger parts, then substeps kept, then a nearer replay."""
    sizes = {update: choices.micro_batch(update) for update in space.updates if space.free(update)}
    split = {update: size for update, size in sizes.items() if size is not None and size < space.batch(update)}
    for update in sorted(split, key=lambda update: -space.batch(update) / split[update]):
        size = split[update]
        while size < space.batch(update):
            size = min(2 * size, space.batch(update))
            whole = size == space.batch(update)
            how = "at once" if whole else f"in micro-batches of {size}"
            yield choices.split(update, None if whole else size), f"the {update} update {how}"
    if choices.checkpoint_substeps and False in space.recomputes:
        yield replace(choices, checkpoint_substeps=False), "substeps kept instead of recomputed"
    for storage in reversed(space.storages[: _place(space, choices)]):
        yield replace(choices, replay_storage=storage), _WHERE[storage]


def _cheaper(space: PlanSpace, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """A replay farther away, the update at the peak in smaller parts, recomputed substeps, still smaller parts."""
    for storage in space.storages[_place(space, choices) + 1 :]:
        yield replace(choices, replay_storage=storage), _WHERE[storage]
    update = max(space.updates, key=lambda update: space.taken(update, choices).peak)
    size = min(choices.micro_batch(update) or space.batch(update), space.batch(update))
    half = -(-size // 2)
    smaller = choices.split(update, half), f"the {update} update in micro-batches of {half}"
    can_halve = space.free(update) and size > 1
    if can_halve and half >= EFFICIENT[update]:
        yield smaller
    if not choices.checkpoint_substeps and True in space.recomputes:
        yield replace(choices, checkpoint_substeps=True), "substeps recomputed in the backward pass"
    if can_halve:
        yield smaller


def _place(space: PlanSpace, choices: Choices) -> int:
    return space.storages.index(choices.replay_storage)


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


def make_plan(
    cfg: Config, facts: Any, budgets: dict[str, Budget], given: Choices | None = None, *, elsewhere: bool = False
) -> Plan:
    """Choose how to run within budgets; what the configuration sets is kept.

    Args:
        cfg (Config): the run's configuration. With ``memory.kind="fixed"`` only the replay's storage is chosen, if that
            is ``"auto"``.
        facts (EnvInfo): its environment's dimensions and number.
        budgets (dict of Budget): ``"host"``, and ``"device"`` if the networks are on a GPU.
        given (Choices, optional): choices of an earlier plan, to be kept if they still fit, but for those that the
            configuration sets by now. Defaults to ``None``.

    Keyword Args:
        elsewhere (bool): whether the run will have a process of its own, on another machine, so that what this process
            holds says nothing. Defaults to ``False``.

    Raises:
        ConfigurationError: if nothing fits; it names the smallest budget that would do.
    """
    return _Planner(cfg, facts, budgets, FRAMEWORK_ESTIMATE if elsewhere else None).plan(given)


class _Planner:
    def __init__(self, cfg: Config, facts: Any, budgets: dict[str, Budget], framework: tuple[int, str] | None) -> None:
        self.cfg, self.budgets = cfg, budgets
        self.space = PlanSpace(cfg, facts, DEVICE if DEVICE in budgets else HOST, framework)

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


TITLES = {HOST: "host memory", DEVICE: "GPU memory", CACHE: "page cache", DISK: "disk"}
WIDTH = 120
_NAME, _AMOUNT = 22, 11


def plan_table(plan: Plan, width: int = WIDTH) -> str:
    """What the run needs, where, how much, why; then the budgets, the choices and the neighbouring plans.

    Args:
        plan (Plan): the plan.
        width (int): columns that a line has at most. Defaults to :data:`WIDTH`.
    """
    lines: list[str] = []
    for place in (DEVICE, HOST, CACHE, DISK):
        if any(item.place == place for item in plan.prediction.items):
            lines += [*_place_lines(plan, place, width), ""]
    return "\n".join([*lines, *_choices(plan, width), "", *_neighbours(plan, width)])


def _place_lines(plan: Plan, place: str, width: int) -> list[str]:
    """What is needed in one place, and whether it is there."""
    prediction = plan.prediction
    unverified = place == DEVICE and not prediction.verified
    lines = [f"{TITLES[place]}, predicted" + (", unverified: not measured on such a device" if unverified else "")]
    items = [item for item in prediction.items if item.place == place]
    for item in items:
        if not item.shared:
            lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    shared = sorted((item for item in items if item.shared), key=lambda item: -item.bytes)
    for item in shared[:1]:
        lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    if shared[1:]:
        lines.append("  at other times, and less:")
    for item in shared[1:]:
        lines += _row(item.what, f"({format_bytes(item.bytes)})", item.why, width)
    return lines + _row("together", format_bytes(prediction.total(place)), _verdict(plan, place), width)


def _row(what: str, amount: str, why: str, width: int) -> list[str]:
    head = f"  {what:<{_NAME}}{amount:>{_AMOUNT}}  "
    rest = " " * len(head)
    wrapped = textwrap.wrap(why, width, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)
    return wrapped or [head.rstrip()]


def _verdict(plan: Plan, place: str) -> str:
    budget = plan.budgets.get(place)
    if budget is None:
        return ""
    fits = "DOES NOT FIT into" if plan.lacks(place) else "fits into"
    guard = f", of which runs stop at {plan.stop_at:.0%}" if place == HOST else ""
    return (
        f"{fits} {format_bytes(plan.usable(place))}: {format_bytes(budget.bytes)} ({budget.source}){guard}, less a "
        f"margin of {plan.margin:.0%}"
    )


def _choices(plan: Plan, width: int) -> list[str]:
    """The choices as words of the command line."""
    choices = plan.choices
    lines = ["choices" if plan.automatic else "choices, as written (memory=fixed)"]
    for field in (update.micro_batch_key for update in UPDATES.values()):
        size = getattr(choices, field)
        word = f"  memory.{field}={'null' if size is None else size}"
        lines.append(f"{word:<{_NAME + _AMOUNT + 6}}{'# the whole batch at once' if size is None else ''}".rstrip())
    lines.append(f"  model.dynamics.checkpoint_substeps={str(choices.checkpoint_substeps).lower()}")
    lines.append(f"  training.replay_storage={choices.replay_storage}")
    if plan.prediction.returns_freed_memory:
        text = "freed memory goes back to the kernel at once: updates are slower and hold what they use"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def _neighbours(plan: Plan, width: int) -> list[str]:
    if not plan.automatic:
        return ["next plans: none was looked for; memory=auto chooses what is open"]

    def lines(name: str, other: Alternative | None, end: str) -> list[str]:
        text = f"none, {end}"
        if other is not None:
            text = f"{format_bytes(other.bytes)} of {TITLES[plan.prediction.compute]} with {other.change}"
        return textwrap.wrap(f"next {name} plan: {text}", width, subsequent_indent="  ", break_on_hyphens=False)

    return [
        *lines("larger", plan.larger, "nothing that is open would make this one faster"),
        *lines("cheaper", plan.cheaper, "nothing that is open would make this one smaller"),
    ]
