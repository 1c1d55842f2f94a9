"""Processes for attempts at small runs, forked from a server that has imported everything and trained one run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import pwm_torchrl.run.train as run_module
from pwm_torchrl.config import Config
from pwm_torchrl.training import train


def quickly() -> None:
    """What makes a small run of a process of its own quick."""
    torch.set_num_threads(1)
    run_module.write_curves = lambda folder: None  # a picture takes longer than the run


def forked(module: str, attempt: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """Start ``attempt(*args)`` of a module of tests, of the file ``module``, in a process."""
    context = multiprocessing.get_context("forkserver")
    file = Path(module).resolve()
    context.set_forkserver_preload([file.stem])
    # The server looks for what it loads there, and silently does without what it does not find.
    search = os.pathsep.join([str(file.parent), str(file.parents[2]), os.environ.get("PYTHONPATH", "")])
    process = context.Process(target=attempt, args=args)
    with patch.dict(os.environ, PYTHONPATH=search):
        process.start()
    return process


def warm_up(cfg: Config) -> None:
    """In the server, a whole run before the forks, which then have what it imports and its memory plan's traces."""
    if multiprocessing.current_process().name == "MainProcess":
        return
    quickly()
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, Path(folder))
