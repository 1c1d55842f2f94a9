"""What the server of :mod:`forked_runs` loads: all that commands import, and a run, whose traces its forks then have.

Importing everything takes 5 s of CPU time, and the memory plan of a run and its first steps as many again.
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
gc.freeze()  # runs look for live graphs among all objects; the forks share these, as long as none is looked at
