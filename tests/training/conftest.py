"""Runs without their picture, which takes longer than the training itself."""

from __future__ import annotations

import pytest

from pwm_torchrl.run import train as run_module


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Module-wide runs are made before this applies and have real ones."""
    monkeypatch.setattr(run_module, "write_curves", lambda run_dir: (run_dir / "curves.png").touch())
