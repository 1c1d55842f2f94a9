"""Reads run directories in any state, without writing to them."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from pwm_torchrl.cluster.restarts import JOB_FILE
from pwm_torchrl.cluster.slurm import JobState, SlurmError, job_states
from pwm_torchrl.commands import typed
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.files import read_object, read_objects
from pwm_torchrl.run.claims import (
    ALIVE,
    ENDED,
    UNKNOWN,
    WITH_PROCESSES,
    Identity,
    describe,
    newest_claim,
    open_owner,
    owner_state,
    read_outcome,
)
from pwm_torchrl.run.claims import FOLDER as CLAIMS
from pwm_torchrl.run.directory import CONFIG_FILE, EVENTS_FILE, PLAN_FILE, SUMMARY_FILE, load_config
from pwm_torchrl.run.metrics import checked_metrics

__all__ = [
    "FAILED",
    "RunReport",
    "find_runs",
    "is_run",
    "last",
    "names_of",
    "natural",
    "number",
    "read_run",
    "read_runs",
    "restart_reasons",
    "settle",
]

_DEPTH = 4  # maximum depth of run directories below a given folder

#: Statuses of runs that ended early without being stopped by the user.
FAILED = ("failed", "memory", "storage", "stalled", "start_up", "died")

#: Events after which a new attempt is expected; until it writes, the summary is that of the last attempt.
_WAITING = ("submit", "restart")

#: Files that identify a run directory whose configuration is damaged.
_RUN_FILES = (CLAIMS, EVENTS_FILE, JOB_FILE, SUMMARY_FILE)
_KEYS = {spec.name for spec in fields(Config)}
#: Types of values in a run's files, by key.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "size", "env", "status", "wandb_url"), str),
    **dict.fromkeys(("seed", "epochs_done", "epochs_planned", "agent_steps", "env_steps", "restarts"), int),
    **dict.fromkeys(("peak_return", "final_return", "random_return", "wall_clock_s"), (int, float)),
    **dict.fromkeys(("choices", "prediction", "budgets"), dict),
    **dict.fromkeys(("mem_mb", "gpus"), int),
    "job_ids": list,
}


@dataclass
class RunReport:
    """Information about a run from its files; ``None`` for unknown values.

    Attributes:
        path: the run's directory.
        name: its name in tables.
        config: its configuration, ``None`` if this version cannot read it.
        metrics: columns of ``metrics.csv`` as floats, NaN for missing values.
        restarts: number of restarts by reason.
        host_bytes: measured peak of anonymous and shared memory.
        host_planned: the peak predicted by its memory plan.
        device_bytes: measured peak of allocated GPU memory, 0 without a GPU.
        device_planned: the peak predicted by its memory plan.
        gpus: number of GPUs, 0 without.
        last_error: the newest error that ended an attempt, and :attr:`problems`.
        problems: a sentence for each file that cannot be read or contradicts another one.
        wandb_url: its W&B page, if it logged online.
        started: time when it was first submitted or started, seconds since the epoch.
        owner: the process that trains it, or that ended without recording it.
        owner_state: whether that process is alive, as determined by :func:`settle`; see
            :func:`~pwm_torchrl.run.claims.owner_state`.
    """

    path: Path
    name: str
    model: str | None = None
    size: str | None = None
    env: str | None = None
    seed: int | None = None
    status: str = "not started"
    peak_return: float | None = None
    final_return: float | None = None
    random_return: float | None = None
    epochs_done: int = 0
    epochs_planned: int | None = None
    env_steps: float | None = None
    wall_clock_s: float | None = None
    restarts: Counter[str] = field(default_factory=Counter)
    host_bytes: float | None = None
    host_planned: float | None = None
    device_bytes: float | None = None
    device_planned: float | None = None
    gpus: int = 0
    last_error: str | None = None
    config: Config | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    started: float = 0.0
    wandb_url: str | None = None
    owner: Identity | None = None
    owner_state: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it trained to its end."""
        return self.status == "finished"

    @property
    def gpu_hours(self) -> float | None:
        """Number of GPUs times hours; ``None`` without a GPU."""
        return self.wall_clock_s * self.gpus / 3600 if self.gpus and self.wall_clock_s is not None else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and below ``paths``, without duplicates.

    Raises:
        ConfigurationError: if a path does not exist or contains no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigurationError(f"{path} is not a directory; give run directories, or folders that hold them")
        here = list(_walk(path, _DEPTH))
        if not here:
            raise ConfigurationError(f"{path} holds no run: there is no {CONFIG_FILE} of one in it or below it")
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(path: Path) -> RunReport:
    """Read a run; values missing from its summary are taken from its metrics and its configuration."""
    report = RunReport(path, path.resolve().name)
    problems = report.problems
    summary, plan, job = (_object(path / name, problems) for name in (SUMMARY_FILE, PLAN_FILE, JOB_FILE))
    metrics = report.metrics = _read_metrics(path / "metrics.csv", problems)
    events = read_objects(path / EVENTS_FILE)
    try:
        report.config = load_config(path)
    except ConfigurationError as error:
        problems.append(str(error))
    outcome: Mapping[str, Any] = {}
    try:
        report.owner, outcome = open_owner(path), _last_outcome(path)
    except ConfigurationError as error:
        problems.append(str(error))
    _identify(report, summary)
    _progress(report, summary, outcome, events)
    report.started = _started(path, events)
    url = summary.get("wandb_url")
    report.wandb_url = url if isinstance(url, str) and url.startswith(("https://", "http://")) else None
    report.restarts = restart_reasons(events, int(number(summary.get("restarts")) or 0))
    _memory(report, summary, plan)
    _compare(summary, metrics, report)
    gpus = number(job.get("gpus"))
    used = bool(report.device_bytes) or any(key.startswith("memory/gpu_") for key in metrics)
    report.gpus = int(gpus) if gpus is not None else int(used)
    report.last_error = "; ".join([*filter(None, [_last_error(path, events)]), *problems]) or None
    return report


def read_runs(paths: Sequence[Path]) -> list[RunReport]:
    """Read runs; they are sorted by environment, size, model and seed, and named by :func:`names_of`."""
    runs = [read_run(path) for path in paths]
    for run, name in zip(runs, names_of(paths)):
        run.name = name
    return sorted(runs, key=lambda run: [natural(v) for v in (run.env, run.size, run.model, run.seed, run.name)])


def settle(runs: Sequence[RunReport], states: Mapping[str, JobState] | None = None) -> None:
    """Correct the status of runs whose process is gone although their files say that they are running: ``died``, or
    ``waiting`` if SLURM will restart their job.

    Args:
        runs: the runs.
        states: SLURM's states of their owners' jobs. Defaults to ``None``: queried once, if an owner is not a process
            of this machine.
    """
    found: dict[str, JobState] | None = None if states is None else dict(states)
    jobs = [run.owner.job_id for run in runs if run.owner is not None and run.owner.job_id is not None]

    def ask(job_id: str) -> str:
        nonlocal found
        if found is None:
            try:
                found = job_states(jobs)
            except SlurmError:
                return UNKNOWN
        job = found.get(job_id)
        return ALIVE if job is not None and job.state in WITH_PROCESSES else ENDED

    here = Identity.here()
    for run in runs:
        if run.owner is None or run.status not in ("running", "not started"):
            continue
        run.owner_state = owner_state(run.owner, here, ask)
        if run.owner_state == ENDED:
            job = (found or {}).get(run.owner.job_id or "")
            run.status = "waiting" if job is not None and job.waiting else "died"
        if run.status == "died":
            end = (
                f"{describe(run.owner)} ended without recording a reason (kill -9, out of memory, a restart of the "
                "machine)"
            )
            how = f"{typed('resume')} {run.path} continues it"
            run.last_error = "; ".join(filter(None, [f"{end}: {how}", run.last_error]))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Paths relative to the innermost common folder, so that names are unique."""
    above = os.path.commonpath([path.resolve().parent for path in paths])
    return [os.path.relpath(path.resolve(), above) for path in paths]


def restart_reasons(events: Sequence[Mapping[str, Any]], restarts: int) -> Counter[str]:
    """Number of restarts of a run by reason, from its ``restart`` events.

    Args:
        events: the run's events.
        restarts: number of restarts in its summary; those without an event were made by hand.
    """
    reasons = Counter(str(event.get("reason", "unknown")) for event in events if event.get("event") == "restart")
    by_hand = restarts - reasons.total()
    if by_hand > 0:
        reasons["by_hand"] = by_hand
    return reasons


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def last(values: Sequence[float]) -> float | None:
    """The last finite value; ``None`` if there is none."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def natural(text: Any) -> list[Any]:
    """Sort key that compares numbers by value, so that 5m comes before 19m."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", str(text))]


def _walk(path: Path, depth: int) -> Iterator[Path]:
    """Runs in and below a folder; does not search inside runs."""
    if is_run(path):
        yield path
    elif depth > 1:
        try:
            children = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        except PermissionError:
            return  # another user's folder among the runs, such as lost+found
        for child in children:
            yield from _walk(child, depth - 1)


def is_run(path: Path) -> bool:
    """Whether the folder has a run's ``config.yaml``, possibly truncated or of another version.

    Other programs write files of that name, too; Hydra's own begin with ``defaults``.
    """
    try:
        text = (path / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    if "defaults" in keys:
        return False
    return len(keys & _KEYS) >= 2 or any((path / name).exists() for name in _RUN_FILES)


def _object(file: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file; adds a problem if the file is damaged or has values of unexpected types."""
    content = read_object(file)
    if not content and file.exists():
        problems.append(f"{file.name} is empty or damaged")
    wrong = [
        key for key, kinds in _KINDS.items() if content.get(key) is not None and not isinstance(content[key], kinds)
    ]
    if wrong:
        problems.append(f"{file.name} is damaged: {', '.join(f'{key}={content[key]}' for key in wrong)}")
    return {key: value for key, value in content.items() if key not in wrong}


def _compare(summary: Mapping[str, Any], metrics: Mapping[str, Sequence[float]], report: RunReport) -> None:
    """Add a problem for each final result that contradicts the newest metrics."""
    if report.status in ("running", "waiting") or not metrics.get("epoch"):
        return
    returns = [value for value in metrics.get("eval/return_mean", []) if math.isfinite(value)]
    logged = {
        "epochs_done": last(metrics["epoch"]),
        "env_steps": last(metrics.get("env_steps", [])),
        "final_return": last(returns),
        "peak_return": max(returns, default=None),
    }
    summarised = number(summary.get("epochs_done"))
    if report.status != "finished" and summarised is not None and summarised < last(metrics["epoch"]):
        return  # the run was killed, and its summary is from its last evaluation
    for key, value in logged.items():
        told = number(summary.get(key))
        if told is not None and value is not None and told != value:
            report.problems.append(f"{SUMMARY_FILE} says {key}={told:g}, metrics.csv says {value:g}")


def _read_metrics(file: Path, problems: list[str]) -> dict[str, list[float]]:
    try:
        metrics, damage = checked_metrics(file)
        problems.extend([] if damage is None else [damage])
        return metrics
    except FileNotFoundError:
        return {}
    except (OSError, csv.Error, ValueError) as error:
        problems.append(f"{file.name} is not readable: {error}")
        return {}


def _identify(report: RunReport, summary: Mapping[str, Any]) -> None:
    config = report.config
    known: dict[str, Any] = {}
    if config is not None:
        env = config.env.get("name") or config.env.get("_target_")
        known = {"model": config.model.name, "size": config.size.name, "env": env}
        known.update(seed=config.seed, epochs_planned=config.training.epochs)
    for key in ("model", "size", "env", "seed", "epochs_planned"):
        setattr(report, key, known.get(key) if summary.get(key) is None else summary[key])


def _last_outcome(path: Path) -> Mapping[str, Any]:
    """The outcome that the newest attempt recorded; empty if it has not ended."""
    newest = newest_claim(path)
    return {} if newest is None else read_outcome(path, newest.attempt) or {}


def _started(path: Path, events: Sequence[Mapping[str, Any]]) -> float:
    """Time of a run's first event, or of its configuration file if it has no events."""
    for event in events:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(event["time"]).timestamp()
    with contextlib.suppress(OSError):
        return (path / CONFIG_FILE).stat().st_mtime
    return 0.0


def _progress(
    report: RunReport, summary: Mapping[str, Any], outcome: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> None:
    metrics = report.metrics
    said = str(summary.get("status") or ("running" if metrics else "not started"))
    if said in ("running", "not started"):  # the summary may be damaged or may not have been written at the end
        said = str(outcome.get("status") or said)
    report.status = said
    waiting = bool(events) and events[-1].get("event") in _WAITING
    if waiting and report.status != "finished":
        report.status = "waiting"
    returns = [value for value in metrics.get("eval/return_mean", []) if math.isfinite(value)]
    running = report.status in ("running", "waiting")  # the summary is older than the metrics
    for key, value in (("peak_return", max(returns, default=None)), ("final_return", last(returns))):
        told = number(summary.get(key))
        setattr(report, key, value if value is not None and (running or told is None) else told)
    report.random_return = number(summary.get("random_return"))
    epochs, done = last(metrics.get("epoch", [])), number(summary.get("epochs_done"))
    report.epochs_done = int(max(epochs or 0, done or 0) if running or done is None else done)
    for key in ("env_steps", "wall_clock_s"):
        told, logged = number(summary.get(key)), last(metrics.get(key, []))
        setattr(report, key, max((v for v in (told, logged) if v is not None), default=None))


def _memory(report: RunReport, summary: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Total peaks and predictions.

    On the host, a plan counts the processes' memory without mapped files. This is sampled once a second; the plan of a
    finished attempt also contains the growth of the peak recorded by the kernel, which misses nothing.
    """
    metrics = report.metrics
    prediction, measured = _section(plan, "prediction"), _section(plan, "measured")
    totals, base = _section(prediction, "totals"), number(prediction.get("base"))
    growth = number(measured.get("host"))
    own = [number(summary.get("peak_own_bytes")), _most(metrics, "memory/peak_own"), _most(metrics, "memory/own")]
    if growth is not None and base is not None:
        own.append(base + growth)
    report.host_bytes = max(filter(None, own), default=None) or number(summary.get("peak_host_bytes"))
    device = [number(summary.get("peak_device_bytes")), number(measured.get("device"))]
    device.append(_most(metrics, "memory/gpu_peak_allocated"))
    report.device_bytes = max((value for value in device if value is not None), default=None)
    report.host_planned = number(totals.get("host")) or None
    report.device_planned = number(totals.get("device")) or None


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _most(metrics: Mapping[str, Sequence[float]], name: str) -> float | None:
    return max((value for value in metrics.get(name, ()) if math.isfinite(value)), default=None)


def _last_error(path: Path, events: Sequence[Mapping[str, Any]]) -> str | None:
    """The error message of the newest failed attempt."""
    outcomes = sorted(path.glob("attempts/*.outcome.json"), key=lambda file: natural(file.name))
    told = [event.get("error") for event in events if event.get("event") in FAILED]
    told += [read_object(file).get("error") for file in outcomes]
    error = next((error for error in reversed(told) if error), None)
    return None if error is None else " ".join(str(error).split())
