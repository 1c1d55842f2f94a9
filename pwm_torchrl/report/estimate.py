"""Cost of a run before it starts: number of parameters, and hours estimated from earlier runs or from operations."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pwm_torchrl.algorithm.base import Update, find_algorithm, updates_of
from pwm_torchrl.algorithm.build import EnvFacts
from pwm_torchrl.algorithm.cost import operations_per_epoch, will_compile
from pwm_torchrl.config import Config
from pwm_torchrl.devices import available_cpus, hardware_name
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.report.collect import find_runs
from pwm_torchrl.run.directory import flattened, load_config, read_summary
from pwm_torchrl.run.metrics import read_metrics

__all__ = ["Duration", "cost_lines", "earlier_duration", "operations", "parameter_counts", "predicted_duration"]

_LABELS = {"model": "world model", "actor": "actor", "critic": "critics"}
#: Keys that do not decide how long an epoch takes; one that ends in a dot stands for its whole section. Runs are
#: compared in all other keys, so that a new one makes them differ until it is listed here.
_UNTIMED = (
    "pretraining", "init_from", "init_from_parts", "seed", "runs_dir", "run_dir", "logger.",
    # the hardware is compared by its name, which on a CPU includes the threads
    "device", "cluster.",
    # labels
    "model.name", "size.name",
    # the world model's dynamics and sizes are part of an extraction's configuration
    "world_model", "world_model_sha256",
    # length of the run
    "training.epochs", "training.steps", "training.progress", "training.video", "training.keep_checkpoints",
    # factors in the losses; of a weight only counts whether it is 0
    "model.vmin", "model.vmax", "model.reward_space", "model.loss.form", "model.loss.rho", "model.loss.dynamics_coef",
    "model.loss.reward_coef", "model.loss.termination_coef", "algorithm.gamma", "algorithm.lmbda",
    "algorithm.target_rate", "algorithm.temperature", "algorithm.target_entropy", "algorithm.log_std_init",
    "algorithm.log_std_min",
    # factors in the optimizers
    "algorithm.model_lr", "algorithm.actor_lr", "algorithm.critic_lr", "algorithm.temperature_lr", "algorithm.final_lr",
    "algorithm.model_betas", "algorithm.actor_betas", "algorithm.critic_betas",
    "algorithm.model_grad_norm", "algorithm.actor_grad_norm", "algorithm.critic_grad_norm",
    # what they decide is compared instead: the updates, and whether the run is compiled
    "algorithm.updates_per_step", "algorithm.max_updates", "algorithm.critic_batch", "algorithm.actor_batch",
    "algorithm.actor_updates", "algorithm.model_batch", "algorithm.model_updates", "algorithm.critic_passes",
    "algorithm.critic_minibatches", "algorithm.compile",
)  # fmt: skip
#: Keys that say which environment or task it is; runs that differ in no others count where there are none of the same.
_PLACE = ("env.name", "env.id", "env.domain", "env.task", "task")
_NEWEST = 200  # maximum number of run directories to read
_EPOCHS = 5  # minimum number of epochs of an earlier run for its time to count
_MEASURED_S = 0.2  # seconds for measuring the rate of this machine
_AT_ONCE = 4  # matrix products per measurement


@dataclass(frozen=True)
class Duration:
    """Estimated duration of a run.

    Attributes:
        hours: the estimate.
        source: text that describes its source.
        lower_bound: whether it only includes arithmetic, without environments and the overhead of small operations.
    """

    hours: float
    source: str
    lower_bound: bool = False


def cost_lines(cfg: Config, facts: EnvFacts, hardware: str, device: torch.device | None) -> list[str]:
    """Lines of text with the number of parameters and the hours.

    Args:
        cfg: the run's configuration.
        facts: facts of its environment or its tasks.
        hardware: name of the hardware that it will run on, as in ``summary.json``.
        device: its device if it runs on this machine, so that the rate can be measured; else ``None``.
    """
    counts = parameter_counts(cfg, facts)
    words = ", ".join(f"{_LABELS[name]} {count:,}" for name, count in counts.items())
    lines = [f"parameters: {sum(counts.values()):,} ({words})"]
    on_gpu = cfg.cluster.gpu is not None and cfg.device != "cpu" if device is None else device.type == "cuda"
    found = earlier_duration(cfg, hardware, "cuda" if on_gpu else "cpu")
    if found is None and device is not None:
        found = predicted_duration(cfg, facts, device)
    if found is None:
        return [*lines, f"hours: unknown; there is no earlier run of this size on {hardware} in {cfg.runs_dir}"]
    hours = f"at least {_hours(found.hours)} of arithmetic" if found.lower_bound else _hours(found.hours)
    return [*lines, f"hours: {hours}, {found.source}"]


def parameter_counts(cfg: Config, facts: EnvFacts) -> dict[str, int]:
    """Number of parameters of each network of a run, trained or not; nothing is allocated."""
    with torch.device("meta"):
        networks = find_algorithm(cfg.algorithm.name).build_networks(cfg, facts, "meta")
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def earlier_duration(cfg: Config, hardware: str, kind: str = "cpu") -> Duration | None:
    """Hours from earlier runs in ``runs_dir`` on equal hardware whose epochs do the same; ``None`` without any.

    Uses the runs in the same environment or task if there are any, else those in others of the same kind and number.

    Args:
        cfg: the run's configuration.
        hardware: name of its hardware, as in ``summary.json``.
        kind: type of its device, ``"cpu"`` or ``"cuda"``.
    """
    try:
        paths = find_runs([Path(cfg.runs_dir).expanduser()])
    except ConfigurationError:  # no such folder, or no run in it
        return None
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:_NEWEST]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    settings, work = _settings(cfg), _work(cfg, kind)
    for run in newest:
        if read_summary(run).get("hardware") != hardware:
            continue
        try:
            other = load_config(run)
            times = [t for t in read_metrics(run / "metrics.csv").get("time/epoch_s", [])[1:] if t == t]
            theirs = _settings(other)
            # The work last: it imports the algorithm and the dynamics, which are the same ones if the settings are.
            alike = len(times) >= _EPOCHS and _timed(theirs) == _timed(settings) and _work(other, kind) == work
        except (ConfigurationError, OSError, ValueError):  # damaged: skipped here, reported by the report
            continue
        if alike:
            seconds[_place(theirs) == _place(settings)].append(fmean(times))
    known = seconds[True] or seconds[False]
    if not known:
        return None
    where = "" if seconds[True] else " of other environments"
    source = (
        f"as {len(known)} earlier run{'s' if len(known) > 1 else ''}{where} of this size took per epoch on {hardware}"
    )
    return Duration(cfg.training.epochs * fmean(known) / 3600, source)


def predicted_duration(cfg: Config, facts: EnvFacts, device: torch.device) -> Duration:
    """Hours from the updates' operations and the measured rate of matrix products on this machine; a lower bound."""
    count, rate = operations(cfg, facts), measured_rate(cfg, device)
    source = f"{count:.2g} operations per epoch at the {rate / 1e9:,.1f} GFLOP/s measured here; there is no earlier run"
    return Duration(cfg.training.epochs * count / rate / 3600, source, lower_bound=True)


def operations(cfg: Config, facts: EnvFacts) -> float:
    """Floating-point operations of an epoch's updates; nothing is allocated."""
    with torch.device("meta"):
        return operations_per_epoch(cfg, find_algorithm(cfg.algorithm.name).build_networks(cfg, facts, "meta"))


def measured_rate(cfg: Config, device: torch.device) -> float:
    """Operations per second on ``device`` of matrix products as large as those of the dynamics' hidden layers.

    Returns the fastest of several measurements, since other processes may be busy.
    """
    rows, width = cfg.algorithm.model_batch, max([*cfg.size.units, 1])
    x, weight = torch.ones(rows, width, device=device), torch.ones(width, width, device=device)
    _ = x @ weight
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MEASURED_S:
        before = time.perf_counter()
        for _ in range(_AT_ONCE):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - before)
    return _AT_ONCE * 2.0 * rows * width * width / fastest


def hardware_of(cfg: Config, device: torch.device | None) -> str:
    """Name of a run's hardware: this machine's, or the GPU in its cluster profile."""
    if device is not None:
        return hardware_name(device, cfg.training.threads or available_cpus())
    return str(cfg.cluster.gpu or cfg.cluster.name)


def _settings(cfg: Config) -> dict[str, Any]:
    return flattened(dataclasses.asdict(cfg))


def _place(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings.get(key) for key in _PLACE}


def _timed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how long an epoch takes, apart from those that are read from the updates."""
    sections, keys = (tuple(key for key in _UNTIMED if key.endswith(".") is section) for section in (True, False))
    timed = {
        key: bool(value) if key.endswith("_weight") else value
        for key, value in settings.items()
        if key not in (*keys, *_PLACE) and not key.startswith(sections)
    }
    processes = max(1, settings["cluster.gpus"]) * settings["cluster.nodes"]
    return {**timed, "processes": processes, "cluster.gres": settings["cluster.gres"]}


def _work(cfg: Config, kind: str) -> tuple[dict[str, Update], bool]:
    """The updates of an epoch, and whether they are compiled on a kind of device."""
    return updates_of(cfg), will_compile(dataclasses.replace(cfg, device=kind))


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"
    return f"{60 * hours:.0f} min" if 60 * hours >= 1 else f"{3600 * hours:.0f} s"
