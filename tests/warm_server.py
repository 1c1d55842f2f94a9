"""Preloaded by the server of :mod:`forked_runs`: imports what commands need, and trains a run to fill their caches.

The imports take 5 s of CPU time, and a run's memory plan and first steps another 5 s.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from forked_runs import quickly
from training_cases import config

from pwm_torchrl.cli.entry import COMMANDS
from pwm_torchrl.training import train

for command in COMMANDS.values():
    for stage in command.stages:
        importlib.import_module(f"pwm_torchrl.cli.{stage.partition(':')[0]}")

write_curves = sys.modules["pwm_torchrl.run.train"].write_curves
quickly()
with tempfile.TemporaryDirectory() as folder:
    train(config(), Path(folder))
sys.modules["pwm_torchrl.run.train"].write_curves = write_curves
gc.collect()
gc.freeze()  # a run's search for live graphs looks at all objects; frozen ones stay shared with the server
