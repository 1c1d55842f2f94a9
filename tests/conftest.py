"""Options of the whole suite."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pwm_torchrl import _pytest_option
from pwm_torchrl.files import MEMORY_FILESYSTEMS, filesystem_type, refuse_memory

# As in an active environment, where messages name the interpreter ``python``.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# Timing says nothing about correctness, and a shared machine is slow at times.
settings.register_profile("pwm", deadline=None)
settings.load_profile("pwm")


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_before_is_not_scanned() -> None:
    """Runs in tests look for live autograd graphs after every step, among all objects that gc knows: a million of
    libraries' and of earlier tests', unless they are put aside. Half of the time of the whole suite went there.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _temporary_folders_are_disks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where temporary folders lie in RAM, a replay on disk may lie there in tests, and nowhere else in RAM."""
    folders = (Path(tempfile.gettempdir()), tmp_path_factory.getbasetemp())
    if filesystem_type(folders[1]) in MEMORY_FILESYSTEMS:
        monkeypatch.setattr(
            "pwm_torchrl.data.replay.refuse_memory",
            lambda folder: None if any(folder.is_relative_to(each) for each in folders) else refuse_memory(folder),
        )


@pytest.fixture(autouse=True)
def _no_configs_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The cluster profiles of whoever runs the tests are not among the choices."""
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path_factory.getbasetemp() / "no_configs"))


@pytest.fixture
def free_signals() -> Iterator[None]:
    """SIGINT and SIGTERM as in a terminal, here and for programs that are started here.

    With nohup and in the background, tests begin with SIGINT ignored, and so do their children.
    """
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    whole = "tests/robustness as a whole, which takes an hour, instead of the part that CI runs"
    parser.addoption("--robust-full", action="store_true", help=whole)
    # Where the package is installed, its entry point has done so already.
    with contextlib.suppress(ValueError):
        _pytest_option.pytest_addoption(parser)
