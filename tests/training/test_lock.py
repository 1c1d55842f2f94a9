"""Two processes never train in one run directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.lock import exclusive

HOLD = """
import sys
from pathlib import Path
from pwm_torchrl.training.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = f"is in use by process {holder.pid}; wait for it"
        with pytest.raises(ConfigurationError, match=message), exclusive(tmp_path):
            raise AssertionError("entered")
    finally:
        holder.kill()  # not an orderly end: the operating system must let go all the same
        holder.communicate()
    with exclusive(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
