"""Runs as a report sees them: in memory, and as directories."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.config import Config
from pwm_torchrl.report.collect import RunReport
from pwm_torchrl.run.directory import save_config


@functools.lru_cache
def _composed(*words: str) -> Config:
    return compose(list(words))


def config(*words: str) -> Config:
    """A configuration of its own, to be changed at will; composing takes long, so the seed is set afterwards."""
    seeds = [word for word in words if word.startswith("seed=")]
    cfg = copy.deepcopy(_composed(*(word for word in words if word not in seeds)))
    for word in seeds:
        cfg.seed = int(word.partition("=")[2])
    return cfg


def report(*words: str, name: str = "", **known: Any) -> RunReport:
    """A run of a configuration, in memory; it finished unless something else is said."""
    cfg = config(*words)
    label = name or f"{cfg.env['name']}_{cfg.model.name}_{cfg.seed}"
    told = {"status": "finished", "epochs_done": cfg.training.epochs, "epochs_planned": cfg.training.epochs, **known}
    names = {"model": cfg.model.name, "size": cfg.size.name, "env": cfg.env["name"], "seed": cfg.seed}
    return RunReport(Path("runs") / label, label, **names, config=cfg, **told)


def write_run(
    path: Path, *words: str, rows: str | None = None, events: list[dict[str, Any]] | None = None, **summary: Any
) -> Path:
    """A run directory with a configuration and what else is given."""
    path.mkdir(parents=True)
    save_config(config(*words), path)
    if rows is not None:
        (path / "metrics.csv").write_text("epoch,env_steps,wall_clock_s,train/return,eval/return_mean\n" + rows)
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    if events is not None:
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
