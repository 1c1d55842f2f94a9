"""Memory plan of a run: the settings it may choose, the settings that fit its budget, and the table that shows them."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pwm_torchrl.algorithm.base import find_algorithm, updates_of
from pwm_torchrl.config import NETWORKS, Config, micro_batch_key
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
    """Budgets of this machine, by place (``"host"``, ``"device"``).

    Args:
        cfg (Config): ``memory.host_gib`` and ``memory.device_gib`` are additional limits.
        device (str, optional): the CUDA device of the networks, or ``None`` on the CPU.

    Raises:
        ConfigurationError: if a SLURM variable with an amount of memory is invalid.
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
    """Budgets of the nodes that a cluster profile describes, by place (``"host"``, ``"device"``).

    Raises:
        ConfigurationError: if the profile does not state the memory of its nodes, lacks the GPU that the run needs, or
            names an unknown GPU.
    """
    profile = cfg.cluster
    if cfg.device.startswith("cuda") and profile.gpu is None:
        raise ConfigurationError(
            f"device={cfg.device} needs a GPU, and cluster={profile.name} has none; set cluster.gpu, or choose another "
            "cluster."
        )
    if profile.host_gib is None and profile.mem_gib is None and cfg.memory.host_gib is None:
        raise ConfigurationError(
            f"cluster={profile.name} does not state the host memory of its nodes; set cluster.host_gib, "
            "cluster.mem_gib or memory.host_gib."
        )
    host = [] if profile.host_gib is None else [Candidate(int(profile.host_gib * 2**30), f"cluster={profile.name}")]
    if profile.mem_gib is not None:
        host.append(Candidate(int(profile.mem_gib * 2**30), "cluster.mem_gib"))
    found: dict[str, tuple[Candidate, ...]] = {HOST: tuple(host)}
    if profile.gpu is not None and cfg.device != "cpu":
        try:
            gpu = device_budget(profile.gpu)
        except ValueError as error:
            raise ConfigurationError(f"cluster.gpu={profile.gpu}: {error}") from error
        found[DEVICE] = () if gpu is None else gpu.candidates
    return {place: _bounded(cfg, place, candidates) for place, candidates in found.items()}


def _bounded(cfg: Config, place: str, candidates: tuple[Candidate, ...]) -> Budget:
    given = cfg.memory.host_gib if place == HOST else cfg.memory.device_gib
    if given is not None:
        candidates = (*candidates, Candidate(int(given * 2**30), f"memory.{place}_gib"))
    return Budget(candidates)


#: Smallest micro-batch in rows; a smaller one costs more time than recomputing a flow's substeps.
MIN_MICRO_BATCH = {"model": 64, "actor": 32, "critic": 256}


class PlanOptions:
    """The settings that a configuration leaves open, and what each choice of them needs.

    Args:
        cfg (Config): the run's configuration.
        facts (EnvInfo): its environment's dimensions and number.
        compute (str): location of the networks, ``"host"`` or ``"device"``.
        framework (tuple, optional): bytes that a process holds before it builds anything, and their source. Defaults
            to ``None``, which measures this process.
    """

    def __init__(self, cfg: Config, facts: Any, compute: str, framework: tuple[int, str] | None = None) -> None:
        self.cfg, self.facts, self.compute = cfg, facts, compute
        self._tracers: dict[bool, UpdateTracer] = {}
        self._framework = framework
        self._simulates = find_algorithm(cfg.algorithm.name).simulates

    @property
    def fastest(self) -> Choices:
        """The configured settings, and the fastest choice for each setting that is open."""
        return self._choices(self.recomputes[0], self.storages[0], self._configured_size)

    @property
    def updates(self) -> tuple[str, ...]:
        """Names of the run's updates."""
        return tuple(updates_of(self.cfg))

    def is_open(self, update: str) -> bool:
        """Whether the configuration leaves an update's micro-batch open."""
        return self._configured_size(update) is None

    def _configured_size(self, update: str) -> int | None:
        size: int | None = getattr(self.cfg.memory, micro_batch_key(update))
        return size

    def _choices(self, recompute: bool, storage: str, size: Callable[[str], int | None]) -> Choices:
        choices = Choices(checkpoint_substeps=recompute, replay_storage=storage)
        for update in self.updates:
            choices = choices.with_micro_batch(update, size(update))
        return choices

    @property
    def recomputes(self) -> list[bool]:
        """Options for recomputing substeps, the fastest first; only a flow has substeps."""
        configured = self.cfg.model.dynamics.checkpoint_substeps
        if self.cfg.model.dynamics.kind != "flow" or self._simulates:
            return [False]
        if self.cfg.memory.kind == "fixed":
            return [bool(configured)]
        return [False, True] if configured is None else [configured]

    @property
    def storages(self) -> list[str]:
        """Options for the location of the replay buffer, the fastest first; a large one is always on disk."""
        t = self.cfg.training
        if self._simulates:
            return ["memory"]  # no replay buffer is used
        if self.cfg.mode != "online":
            return ["disk"]  # stored episodes are read from their files
        if t.replay_storage != "auto":
            return [t.replay_storage]
        size = replay_bytes(self.facts.observation_dim, self.facts.action_dim, t.replay_capacity, self.facts.num_envs)
        if size > self.cfg.memory.disk_above_gib * 2**30:
            return ["disk"]
        return [*(["device"] if self.compute == DEVICE else []), "memory", "disk"]

    def tracer(self, recompute: bool) -> UpdateTracer:
        """A tracer of the configuration with or without recomputed substeps."""
        if recompute not in self._tracers:
            cfg = copy.deepcopy(self.cfg)
            cfg.model.dynamics.checkpoint_substeps = recompute
            self._tracers[recompute] = UpdateTracer(cfg, self.facts)
        return self._tracers[recompute]

    def batch(self, update: str) -> int:
        """Rows of an update's batch."""
        return self.tracer(self.recomputes[0]).batches[update]

    def transient(self, update: str, choices: Choices) -> Transient:
        """Memory of one update in addition to what persists."""
        return self.tracer(choices.checkpoint_substeps).transient(update, choices.micro_batch(update))

    def predict(self, choices: Choices) -> Prediction:
        """Predicted memory of a run with these choices; all predictions of one plan use the same base."""
        if self._framework is None:
            self.tracer(choices.checkpoint_substeps).persistent  # noqa: B018 - the base includes what tracing imports
            held, source = framework_bytes()
            self._framework = held - sum(tracer.allocated for tracer in self._tracers.values()), source
        tracer = self.tracer(choices.checkpoint_substeps)
        return predict(self.cfg, self.facts, choices, self.compute, tracer, self._framework)

    def bytes_needed(self, choices: Choices) -> int:
        """Peak bytes in the place of the networks."""
        return self.predict(choices).total(self.compute)

    @property
    def smallest(self) -> Choices:
        """The choices that need the least memory."""
        return self._choices(self.recomputes[-1], self.storages[-1], lambda update: self._configured_size(update) or 1)

    def restricted(self, given: Choices) -> Choices:
        """Earlier choices, replaced where the configuration now says otherwise."""
        return self._choices(
            _allowed(given.checkpoint_substeps, self.recomputes),
            _allowed(given.replay_storage, self.storages),
            lambda update: self._configured_size(update) or given.micro_batch(update),
        )


def _allowed(value: Any, options: list[Any]) -> Any:
    """``value`` if it is one of the options, otherwise the first option."""
    return value if value in options else options[0]


def halvings(batch: int) -> list[int]:
    """A batch, its half, ... down to 1."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


_REPLAY_IN = {"device": "the replay on the GPU", "memory": "the replay in host memory", "disk": "the replay on disk"}


@dataclass(frozen=True)
class Alternative:
    """Another plan: the difference in words, and the bytes it needs in the place of the networks."""

    change: str
    bytes: int


def larger_plan(options: PlanOptions, choices: Choices) -> Alternative | None:
    """The next faster plan that needs more memory; ``None`` if there is none."""
    needed = options.bytes_needed(choices)
    found = (Alternative(change, options.bytes_needed(other)) for other, change in _larger(options, choices))
    return next((other for other in found if other.bytes > needed), None)


def cheaper_plan(options: PlanOptions, choices: Choices) -> Alternative | None:
    """The fastest plan among the next ones that need less memory; ``None`` if there is none."""
    needed = options.bytes_needed(choices)
    found = (Alternative(change, options.bytes_needed(other)) for other, change in _cheaper(options, choices))
    return next((other for other in found if other.bytes < needed), None)


def _larger(options: PlanOptions, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """Larger micro-batches for the update split into the most parts, then no recomputation, then a faster replay."""
    sizes = {update: choices.micro_batch(update) for update in options.updates if options.is_open(update)}
    split = {update: size for update, size in sizes.items() if size is not None and size < options.batch(update)}
    for update in sorted(split, key=lambda update: -options.batch(update) / split[update]):
        size = split[update]
        while size < options.batch(update):
            size = min(2 * size, options.batch(update))
            whole = size == options.batch(update)
            how = "at once" if whole else f"in micro-batches of {size}"
            yield choices.with_micro_batch(update, None if whole else size), f"the {update} update {how}"
    if choices.checkpoint_substeps and False in options.recomputes:
        yield replace(choices, checkpoint_substeps=False), "substeps kept instead of recomputed"
    for storage in reversed(options.storages[: _storage_index(options, choices)]):
        yield replace(choices, replay_storage=storage), _REPLAY_IN[storage]


def _cheaper(options: PlanOptions, choices: Choices) -> Iterator[tuple[Choices, str]]:
    """A slower replay, smaller micro-batches for the update at the peak, recomputation, still smaller micro-batches."""
    for storage in options.storages[_storage_index(options, choices) + 1 :]:
        yield replace(choices, replay_storage=storage), _REPLAY_IN[storage]
    update = max(options.updates, key=lambda update: options.transient(update, choices).peak)
    size = min(choices.micro_batch(update) or options.batch(update), options.batch(update))
    half = -(-size // 2)
    smaller = choices.with_micro_batch(update, half), f"the {update} update in micro-batches of {half}"
    can_halve = options.is_open(update) and size > 1
    if can_halve and half >= MIN_MICRO_BATCH[update]:
        yield smaller
    if not choices.checkpoint_substeps and True in options.recomputes:
        yield replace(choices, checkpoint_substeps=True), "substeps recomputed in the backward pass"
    if can_halve:
        yield smaller


def _storage_index(options: PlanOptions, choices: Choices) -> int:
    return options.storages.index(choices.replay_storage)


#: Host memory by which two processes of the same run may differ before they build anything.
PROCESS_VARIATION = 16 * MIB


@dataclass(frozen=True)
class Plan:
    """Choices, the memory they need and the budgets.

    Attributes:
        choices (Choices): the settings of the run.
        prediction (Prediction): the memory it needs.
        budgets (dict of Budget): by place, ``"host"`` and, with a GPU, ``"device"``.
        margin (float): fraction of each usable budget that stays free.
        stop_at (float): fraction of the host budget at which the run's memory guard stops it.
        automatic (bool): whether the planner made the choices; otherwise they were configured.
        batches (dict of int): rows of each update's batch, by the update's name.
        larger (Alternative, optional): the next faster plan, which needs more memory.
        cheaper (Alternative, optional): the next plan that needs less memory.
    """

    choices: Choices
    prediction: Prediction
    budgets: dict[str, Budget]
    margin: float
    stop_at: float
    automatic: bool
    batches: dict[str, int]
    larger: Alternative | None = None
    cheaper: Alternative | None = None

    def usable(self, place: str) -> int:
        """Bytes of a budget that a plan may use: the part below the guard's threshold, minus the margin."""
        return int(self.budgets[place].bytes * self.share(place))

    def share(self, place: str) -> float:
        """Fraction of a budget that a plan may use."""
        return (self.stop_at if place == HOST else 1.0) * (1 - self.margin)

    def shortages(self) -> list[str]:
        """A sentence for each budget that the run does not fit into."""
        return [
            f"{place} memory: {format_bytes(self.prediction.total(place))} needed, {format_bytes(self.usable(place))} "
            f"usable ({self.share(place):.0%} of {format_bytes(budget.bytes)}, {budget.source})"
            for place, budget in self.budgets.items()
            if self.exceeds(place)
        ]

    def exceeds(self, place: str) -> bool:
        """Whether the run needs more than it may use of a budget."""
        return self.prediction.total(place) > self.usable(place)

    def applied(self, cfg: Config) -> Config:
        """A copy of the configuration with the choices filled in."""
        cfg = copy.deepcopy(cfg)
        for name in map(micro_batch_key, NETWORKS):
            setattr(cfg.memory, name, getattr(self.choices, name))
        cfg.model.dynamics.checkpoint_substeps = self.choices.checkpoint_substeps
        cfg.training.replay_storage = self.choices.replay_storage
        return cfg

    def as_dict(self) -> dict[str, Any]:
        """Contents of ``memory_plan.json``."""
        return {
            "choices": asdict(self.choices),
            "batches": self.batches,
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
    """Choose the settings that fit the budgets, keeping those that the configuration sets.

    Args:
        cfg (Config): the run's configuration. With ``memory.kind="fixed"``, only the location of the replay buffer is
            chosen, if it is ``"auto"``.
        facts (EnvInfo): its environment's dimensions and number.
        budgets (dict of Budget): ``"host"``, and ``"device"`` if the networks are on a GPU.
        given (Choices, optional): choices of an earlier plan. They are kept if they still fit, except where the
            configuration now says otherwise. Defaults to ``None``.

    Keyword Args:
        elsewhere (bool): whether the run will use another process, so that the memory of this process must not be
            counted. Defaults to ``False``.

    Raises:
        ConfigurationError: if nothing fits; the message states the smallest sufficient budget.
    """
    return _Planner(cfg, facts, budgets, FRAMEWORK_ESTIMATE if elsewhere else None).plan(given)


class _Planner:
    def __init__(self, cfg: Config, facts: Any, budgets: dict[str, Budget], framework: tuple[int, str] | None) -> None:
        self.cfg, self.budgets = cfg, budgets
        self.options = PlanOptions(cfg, facts, DEVICE if DEVICE in budgets else HOST, framework)

    def build(self, choices: Choices) -> Plan:
        memory = self.cfg.memory
        prediction = self.options.predict(choices)
        batches = {update: self.options.batch(update) for update in self.options.updates}
        return Plan(choices, prediction, self.budgets, memory.margin, memory.stop_at, memory.kind != "fixed", batches)

    def plan(self, given: Choices | None) -> Plan:
        if self.cfg.memory.kind == "fixed":
            return self.with_storage(self.options.fastest)
        if given is not None:
            kept = self.build(self.options.restricted(given))
            if not kept.shortages():
                return self.with_alternatives(kept)
        for choices in self.candidates():
            plan = self.with_storage(choices)
            if not plan.shortages():
                return self.with_alternatives(plan)
        raise self.does_not_fit()

    def candidates(self) -> Iterator[Choices]:
        """Choices from fast to small: large micro-batches, then recomputed substeps, then small micro-batches."""
        for recompute in self.options.recomputes:
            yield from self.sized(recompute, MIN_MICRO_BATCH)
        yield from self.sized(self.options.recomputes[-1], dict.fromkeys(self.options.updates, 1))

    def sized(self, recompute: bool, smallest: dict[str, int]) -> Iterator[Choices]:
        """Choices with the largest micro-batches that fit; none if one would be below ``smallest``."""
        chosen = replace(self.options.fastest, checkpoint_substeps=recompute)
        limit = self.limit(chosen)
        for update in self.options.updates:
            if not self.options.is_open(update):
                continue
            size = self.largest(chosen, update, limit, smallest[update])
            if size is None:
                return
            chosen = chosen.with_micro_batch(update, None if size == self.options.batch(update) else size)
        yield chosen

    def limit(self, choices: Choices) -> int:
        """Bytes that an update may use in the place of the networks, with the replay in its slowest allowed place."""
        plan = self.build(replace(choices, replay_storage=self.options.storages[-1]))
        compute = self.options.compute
        return plan.usable(compute) - sum(
            item.bytes for item in plan.prediction.items if item.place == compute and not item.shared
        )

    def largest(self, choices: Choices, update: str, limit: int, smallest: int) -> int | None:
        """The largest micro-batch whose update stays within ``limit``, found by halving the batch."""
        batch, *sizes = halvings(self.options.batch(update))
        whole = self.options.transient(update, choices)
        if whole.peak <= limit:
            return batch
        # Activations shrink roughly in proportion to the micro-batch; this only selects which sizes to trace.
        rest = whole.gradients + whole.data
        sizes = [size for size in sizes if size >= smallest]
        likely = [size for size in sizes if rest + whole.activations * size / batch <= 1.05 * limit] or sizes[-1:]
        fitting = (
            s for s in likely if self.options.transient(update, choices.with_micro_batch(update, s)).peak <= limit
        )
        return next(fitting, None)

    def with_storage(self, choices: Choices) -> Plan:
        """The plan with the fastest replay that fits: on the GPU, else in RAM, else on disk."""
        plans = [self.build(replace(choices, replay_storage=storage)) for storage in self.options.storages]
        return next((plan for plan in plans if not plan.shortages()), plans[-1])

    def with_alternatives(self, plan: Plan) -> Plan:
        larger, cheaper = larger_plan(self.options, plan.choices), cheaper_plan(self.options, plan.choices)
        return replace(plan, larger=larger, cheaper=cheaper)

    def does_not_fit(self) -> ConfigurationError:
        """An error with the budget that the smallest plan needs."""
        plan = self.build(self.options.smallest)
        needed = [self.needed(plan, place) for place in self.budgets if plan.exceeds(place)]
        capacity = f"less than training.replay_capacity={self.cfg.training.replay_capacity}"
        on_disk = self.options.storages[-1] == "disk"
        remedies = "a smaller size" if on_disk else f"a smaller size, training.replay_storage=disk or {capacity}"
        return ConfigurationError(
            f"{self.cfg.model.name} {self.cfg.size.name} does not fit, even in the smallest micro-batches: "
            f"{'; '.join(plan.shortages())}. The smallest budget that would work: {', '.join(needed)}. Raise the "
            f"budget, or choose {remedies}."
        )

    def needed(self, plan: Plan, place: str) -> str:
        """The smallest sufficient budget and the key that sets it."""
        least = plan.prediction.total(place) / plan.share(place) + (PROCESS_VARIATION if place == HOST else 0)
        group = "cluster" if place == HOST and self.budgets[place].source.startswith("cluster=") else "memory"
        gib = math.ceil(least / 2**30 * 100) / 100  # rounded up to what the configuration takes
        return f"{place} memory of {format_bytes(least)} ({group}.{place}_gib={gib:g})"


TITLES = {HOST: "host memory", DEVICE: "GPU memory", CACHE: "page cache", DISK: "disk"}
WIDTH = 120
_NAME, _AMOUNT = 22, 11


def plan_table(plan: Plan, width: int = WIDTH) -> str:
    """Text table of a plan: the memory needed in each place, the budgets, the choices and the alternative plans.

    Args:
        plan (Plan): the plan.
        width (int): maximum line width in columns. Defaults to :data:`WIDTH`.
    """
    lines: list[str] = []
    for place in (DEVICE, HOST, CACHE, DISK):
        if any(item.place == place for item in plan.prediction.items):
            lines += [*_place_lines(plan, place, width), ""]
    return "\n".join([*lines, *_choices(plan, width), "", *_alternatives(plan, width)])


def _place_lines(plan: Plan, place: str, width: int) -> list[str]:
    """The memory needed in one place, and whether it fits."""
    prediction = plan.prediction
    unverified = place == DEVICE and not prediction.verified
    lines = [
        f"{TITLES[place]}, predicted" + (", unverified: not measured on this kind of device" if unverified else "")
    ]
    items = [item for item in prediction.items if item.place == place]
    for item in items:
        if not item.shared:
            lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    shared = sorted((item for item in items if item.shared), key=lambda item: -item.bytes)
    for item in shared[:1]:
        lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    if shared[1:]:
        lines.append("  other phases, never at the same time:")
    for item in shared[1:]:
        lines += _row(item.what, f"({format_bytes(item.bytes)})", item.why, width)
    return lines + _row("total", format_bytes(prediction.total(place)), _verdict(plan, place), width)


def _row(what: str, amount: str, why: str, width: int) -> list[str]:
    head = f"  {what:<{_NAME}}{amount:>{_AMOUNT}}  "
    rest = " " * len(head)
    wrapped = textwrap.wrap(why, width, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)
    return wrapped or [head.rstrip()]


def _verdict(plan: Plan, place: str) -> str:
    budget = plan.budgets.get(place)
    if budget is None:
        return ""
    fits = "DOES NOT FIT into" if plan.exceeds(place) else "fits into"
    guard = f", a run stops at {plan.stop_at:.0%} of it" if place == HOST else ""
    return (
        f"{fits} {format_bytes(plan.usable(place))}: {format_bytes(budget.bytes)} ({budget.source}){guard}, minus a "
        f"margin of {plan.margin:.0%}"
    )


def _choices(plan: Plan, width: int) -> list[str]:
    """The choices as command-line overrides."""
    choices = plan.choices
    lines = ["choices" if plan.automatic else "choices, as configured (memory=fixed)"]
    for field in map(micro_batch_key, NETWORKS):
        size = getattr(choices, field)
        word = f"  memory.{field}={'null' if size is None else size}"
        lines.append(f"{word:<{_NAME + _AMOUNT + 6}}{'# the whole batch at once' if size is None else ''}".rstrip())
    lines.append(f"  model.dynamics.checkpoint_substeps={str(choices.checkpoint_substeps).lower()}")
    lines.append(f"  training.replay_storage={choices.replay_storage}")
    if plan.prediction.returns_freed_memory:
        text = "freed memory is returned to the kernel at once: updates are slower and use less memory"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def _alternatives(plan: Plan, width: int) -> list[str]:
    if not plan.automatic:
        return ["next plans: not searched; memory=auto chooses the open settings"]

    def lines(name: str, other: Alternative | None, end: str) -> list[str]:
        text = f"none, {end}"
        if other is not None:
            text = f"{format_bytes(other.bytes)} of {TITLES[plan.prediction.compute]} with {other.change}"
        return textwrap.wrap(f"next {name} plan: {text}", width, subsequent_indent="  ", break_on_hyphens=False)

    return [
        *lines("larger", plan.larger, "no open setting would make this one faster"),
        *lines("cheaper", plan.cheaper, "no open setting would make this one smaller"),
    ]
