"""The options ``--golden-dir`` and ``--tasks-dir`` of this project's tests, known to pytest before it looks for a
configuration file.

Registered as a pytest plugin of the package: an option of ``tests/conftest.py`` alone is unknown while pytest reads
``pytest -m golden --golden-dir DIR``, which would then take a DIR outside the project for the tests to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add the options, in this project's root only: other projects' tests have no use for them."""
    if not _in_this_project():
        return
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="pwm-torchrl: folder of golden cases that `-m golden` compares against (default: tests/golden)",
    )
    parser.addoption(
        "--tasks-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="pwm-torchrl: folder of recorded transitions that `-m tasks` compares with (default: tests/envs/tasks)",
    )


def pytest_configure(config: Any) -> None:
    """Name the markers: with a DIR outside the project, pytest does not read the project's configuration file."""
    if _in_this_project():
        for marker in ("golden", "gpu", "slow", "slurm", "tasks"):
            config.addinivalue_line("markers", f"{marker}: see pyproject.toml")


def _in_this_project() -> bool:
    return (Path.cwd() / "tests" / "golden" / "golden_cases.py").is_file()
