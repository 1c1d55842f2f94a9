"""Runs without their picture, which takes longer than the training itself."""

from __future__ import annotations

import pytest

from pwm_torchrl.training import base_run


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Module-wide runs are made before this applies and have real ones."""
    monkeypatch.setattr(base_run, "write_curves", lambda run_dir: (run_dir / "curves.png").touch())
