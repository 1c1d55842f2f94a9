"""A run's memory plan: made before anything large is built, saved in the run directory, compared with measurements.

The decision whether to compile the run is made here too, because it must also come before anything is built.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pwm_torchrl.algorithm.cost import will_compile
from pwm_torchrl.config import Config
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.plan import Plan, budgets, make_plan, plan_table
from pwm_torchrl.memory.predict import DEVICE, HOST, Choices, return_freed_memory
from pwm_torchrl.memory.readings import format_bytes, read_process
from pwm_torchrl.run.artifacts import write_atomically
from pwm_torchrl.run.directory import PLAN_FILE, read_plan
from pwm_torchrl.run.summary import peak_device_bytes
from pwm_torchrl.terminal import warn

TABLE_FILE = "memory_plan.txt"


class RunPlan:
    """The plan of one attempt at a run.

    A resumed run keeps the choices of the previous attempt if they still fit, because another micro-batch size would
    change its rounding.

    Args:
        cfg (Config): the run's configuration.
        info (EnvInfo): its environment's facts.
        device (torch.device): device of the networks.
        run_dir (Path): the directory in which the plan is saved.
        resume (bool): whether to keep an earlier attempt's choices.

    Raises:
        ConfigurationError: if the run cannot fit; the message names the smallest budget that is sufficient.
    """

    def __init__(self, cfg: Config, info: EnvInfo, device: torch.device, run_dir: Path, resume: bool) -> None:
        self.run_dir = run_dir
        limits = budgets(cfg, str(device) if device.type == "cuda" else None)
        self.plan: Plan = make_plan(cfg, info, limits, saved_choices(run_dir) if resume else None)
        if not self.plan.automatic:
            for shortage in self.plan.shortages():
                warnings.warn(f"memory=fixed will not fit: {shortage}", stacklevel=2)
        self.before = read_process()
        if self.plan.prediction.returns_freed_memory:
            return_freed_memory()
        self.write(None)

    def write(self, measured: dict[str, int] | None) -> None:
        """Write the plan and, if known, the measured memory in bytes."""
        content = {**self.plan.as_dict(), "measured": measured}
        write_atomically(self.run_dir / PLAN_FILE, json.dumps(content, indent=2) + "\n")
        lines = [plan_table(self.plan), *([] if measured is None else ["", *self.comparison(measured)])]
        write_atomically(self.run_dir / TABLE_FILE, "\n".join(lines) + "\n")

    @contextmanager
    def compared(self, is_there: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Run the block, then compare the plan with the measured peaks; after an error, only if ``is_there()``."""
        try:
            yield
        except BaseException:
            if not is_there():
                raise
            try:
                self.finish()
            except OSError as unwritten:  # the error that ended the run is more important, and may be the same
                warn(f"measured memory could not be written next to the plan: {unwritten}")
            raise
        self.finish()

    def finish(self) -> list[str]:
        """Compare with the measured peaks of this attempt; returns a line each for the host and the device."""
        measured: dict[str, int] = {}
        now = read_process()
        # The kernel keeps one peak per process: it is this run's if it is higher than before the run.
        if self.before is not None and now is not None and now.peak > self.before.peak:
            measured[HOST] = now.peak - self.before.rss
        if DEVICE in self.plan.budgets:
            measured[DEVICE] = peak_device_bytes()
        self.write(measured)
        return self.comparison(measured)

    def comparison(self, measured: dict[str, int]) -> list[str]:
        """Lines with measured and predicted memory; for the host, the growth since the plan was made."""
        prediction = self.plan.prediction
        predicted = {HOST: prediction.growth, DEVICE: prediction.total(DEVICE)}
        name = {HOST: "host memory above its base", DEVICE: "GPU memory"}
        lines = []
        for place in self.plan.budgets:
            amount = f"{format_bytes(measured[place])} measured" if place in measured else "not measured"
            lines.append(f"{name[place]}: {amount}, {format_bytes(predicted[place])} predicted")
        return lines


COMPILE_FILE = "compile.json"


def decided_compile(cfg: Config, device: torch.device, run_dir: Path, resume: bool) -> Config:
    """``cfg`` with ``algorithm.compile`` true or false; a resumed run keeps the decision that it began with.

    Compiled code rounds differently, which would make a resumed run differ from an uninterrupted one. Without a
    compiler, the run is eager, with a warning.

    Raises:
        ConfigurationError: if the file with an earlier decision is damaged.
    """
    file = run_dir / COMPILE_FILE
    if resume and file.exists():
        decision = _saved_decision(file)
    else:
        decision = will_compile(replace(cfg, device=device.type))
    if decision and (missing := compiler_missing()) is not None:
        warn(f"{missing}: the run is not compiled; install one, or set algorithm.compile=false.")
        decision = False
    write_atomically(file, json.dumps({"compile": decision}) + "\n")
    return replace(cfg, algorithm=replace(cfg.algorithm, compile=decision))


def _saved_decision(file: Path) -> bool:
    try:
        decision = json.loads(file.read_text(encoding="utf-8"))["compile"]
        if not isinstance(decision, bool):
            raise ValueError(f"compile={decision}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{file} does not say whether the run was compiled ({error}); delete it to decide again."
        ) from error
    return decision


def compiler_missing() -> str | None:
    """What ``torch.compile`` lacks on this machine, as the start of a message; ``None`` if nothing."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if any(shutil.which(name) for name in wanted):
        return None
    return f"No C++ compiler was found ({', '.join(wanted)})"


def saved_choices(run_dir: Path) -> Choices | None:
    """The choices of the last attempt; ``None`` if there is none or, with a warning, if they cannot be read."""
    plan = read_plan(run_dir, "the run's memory is planned again")
    return None if plan is None else Choices(**plan["choices"])
