"""A signal in any phase of a run, however that was started, stops it so that it goes on to the same end."""

from __future__ import annotations

import itertools
import signal
import sys
from pathlib import Path

import pytest
from damaged_runs import learned
from run_files import events, summary_of
from stopped_runs import PATHS, PHASES, run
from training_cases import rows_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and sends signals")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run(folder, "in_process") == "finished"
    return folder


def cases(whole: bool) -> list[tuple[str, signal.Signals, str]]:
    """Launch path, signal and phase: all, or so many that each two of them meet."""
    everything = list(itertools.product(PATHS, range(2), PHASES))
    if not whole:  # SIGTERM, which both paths have, comes in each phase of one of them
        paths, phases = list(PATHS), list(PHASES)
        everything = [
            (path, which, phase)
            for path, which, phase in everything
            if which == 0 or (paths.index(path) + phases.index(phase)) % 2 == 0
        ]
    return [(path, PATHS[path][which], phase) for path, which, phase in everything]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "phase" in metafunc.fixturenames:
        chosen = cases(metafunc.config.getoption("robust_full"))
        metafunc.parametrize(("path", "signum", "phase"), chosen, ids=[f"{p}-{s.name}-{w}" for p, s, w in chosen])


def test_stops_and_goes_on_to_the_same_end(path, signum, phase, straight, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, path, phase, signum) == "stopped"
    assert summary_of(folder)["status"] == "stopped"
    assert [each["event"] for each in events(folder)][-1] == "stopped"
    assert run(folder, path) == "finished"
    assert rows_of(folder) == rows_of(straight)
    assert learned(folder) == learned(straight)
    assert summary_of(folder)["resume_exact"]
    assert not list((folder / "checkpoints").glob("*/.*"))


def test_few_cases_have_each_two_together():
    few, everything = cases(False), cases(True)
    assert len(few) < len(everything)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert {(each[one], each[other]) for each in few} == {(each[one], each[other]) for each in everything}
