"""A training function that learns nothing, in this process and in submitted ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from pwm_torchrl import training

STUB = Path(__file__).with_name("training_stub.py")


@pytest.fixture
def stub_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts the stub in the place of what ``pwm_torchrl.training`` names.

    A submitted job is a new interpreter: it is reached through a ``sitecustomize`` on its path.
    """
    spec = importlib.util.spec_from_file_location("training_stub", STUB)
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    for name in stub.FAKED:
        monkeypatch.setitem(vars(training), name, getattr(stub, name))  # names that it would load on first use

    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.append({str(STUB.parent)!r})\n"
        "import training_stub\n"
        "sys.modules['pwm_torchrl.training'] = training_stub.fake_training()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    return training


@pytest.fixture
def workdir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty current folder; the import path is as before afterwards."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder
