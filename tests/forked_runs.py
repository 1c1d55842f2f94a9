"""Processes for attempts at small runs, forked from a server that has imported everything and trained one run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import pwm_torchrl.run.train as run_module

TESTS = Path(__file__).resolve().parent


def quickly() -> None:
    """What makes a small run of a process of its own quick."""
    torch.set_num_threads(1)
    run_module.write_curves = lambda folder: None  # a picture takes longer than the run


def forked(attempt: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """Start ``attempt(*args)``, a function of a module of tests, in a process."""
    context = multiprocessing.get_context("forkserver")
    # Whichever module of tests needs the server first starts it, for all of them.
    context.set_forkserver_preload(["warm_server"])
    # The server looks for what it loads there, and silently does without what it does not find.
    search = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = context.Process(target=attempt, args=args)
    with patch.dict(os.environ, PYTHONPATH=search):
        process.start()
    return process
