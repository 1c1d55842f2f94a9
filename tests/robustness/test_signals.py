"""A signal in any phase of a run, however that was started, stops it so that it goes on to the same end.

Commands that train nothing end at once, and work the next time.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from damaged_runs import learned
from run_files import events, summary_of
from stopped_runs import COMMANDS, KINDS, PATHS, TRAINED, run, run_typed, small, stored
from stored_cases import write_store
from training_cases import rows_of

from pwm_torchrl.config import Config

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and sends signals")

TASKS = ("pendulum-swingup", "cup-catch")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Config]]:
    """The run of each kind that nothing disturbs, made when it is needed, and its configuration."""
    place, made = tmp_path_factory.mktemp("straight"), {}

    def of(kind: str) -> tuple[Path, Config]:
        if kind not in made:
            if kind == "online":
                cfg = small()
            elif kind == "pretrain":
                cfg = stored(kind, write_store(place / "store", TASKS))
            else:
                cfg = stored(kind, Path(str(of("pretrain")[1].data.path)), of("pretrain")[0])
            assert run(place / kind, cfg, "in_process") == "finished"
            made[kind] = place / kind, cfg
        return made[kind]

    return of


Case = tuple[str, str, signal.Signals, str]


def cases(whole: bool) -> list[Case]:
    """Kind of run, launch path, signal and phase: all, or so many that of online runs each two of the others meet."""
    everything = [
        (kind, path, which, phase)
        for kind, phases in KINDS.items()
        for path, which, phase in itertools.product(PATHS, range(2), phases)
    ]
    if not whole:
        paths, phases = list(PATHS), KINDS["online"]
        few = [
            (kind, path, which, phase)
            for kind, path, which, phase in everything
            # SIGTERM, which both paths have, comes in each phase of one of them.
            if kind == "online" and (which == 0 or (paths.index(path) + phases.index(phase)) % 2 == 0)
        ]
        everything = [*few, ("pretrain", "job", 1, "update")]
    return [(kind, path, PATHS[path][which], phase) for kind, path, which, phase in everything]


def commands(whole: bool) -> list[tuple[str, signal.Signals]]:
    """Commands and the signals that they get."""
    if not whole:
        return [("evaluate", signal.SIGINT)]
    return list(itertools.product(COMMANDS, (signal.SIGINT, signal.SIGTERM)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("robust_full")
    if "phase" in metafunc.fixturenames:
        ids = ["-".join((kind, path, s.name, phase)) for kind, path, s, phase in cases(whole)]
        metafunc.parametrize(("kind", "path", "signum", "phase"), cases(whole), ids=ids)
    if "command" in metafunc.fixturenames:
        ids = [f"{command}-{s.name}" for command, s in commands(whole)]
        metafunc.parametrize(("command", "signum"), commands(whole), ids=ids)


def test_stops_and_goes_on_to_the_same_end(kind, path, signum, phase, straight, tmp_path):
    undisturbed, cfg = straight(kind)
    folder = tmp_path / "run"
    assert run(folder, cfg, path, phase, signum) == "stopped"
    assert summary_of(folder)["status"] == "stopped"
    assert [each["event"] for each in events(folder)][-1] == "stopped"
    assert run(folder, cfg, path) == "finished"
    assert rows_of(folder) == rows_of(undisturbed)
    assert learned(folder, TRAINED[kind]) == learned(undisturbed, TRAINED[kind])
    assert summary_of(folder)["resume_exact"]
    assert not list((folder / "checkpoints").glob("*/.*"))


def test_a_command_ends_at_once_and_works_the_next_time(command, signum, straight, tmp_path):
    out, said, result = tmp_path / "out", tmp_path / "said.txt", tmp_path / "result.json"
    words = {
        "evaluate": lambda: [str(straight("online")[0]), "--episodes", "1", "--json", str(result)],
        "check_env": lambda: ["env=pendulum", "env.num_envs=2"],
        "data": lambda: ["generate", "--out", str(out), "--tasks", ",".join(TASKS), "--episodes", "1"],
    }[command]()
    before = {file: file.read_bytes() for file in straight("online")[0].rglob("*") if file.is_file()}
    # While there are environments, SIGTERM is taken as Ctrl-C is, so that their processes end too.
    assert run_typed(command, words, said, signum) in ((130,) if signum == signal.SIGINT else (130, -signum))
    assert "Traceback" not in said.read_text()
    done = ["chunk_0.pt"] if command == "data" else []
    assert [file.name for file in out.glob("*")] == done
    assert not result.exists()
    assert run_typed(command, words, said) == 0, said.read_text()
    assert "Traceback" not in said.read_text()
    assert sorted(file.name for file in out.glob("*")) == (["chunk_0.pt", "chunk_1.pt"] if command == "data" else [])
    assert {file: file.read_bytes() for file in straight("online")[0].rglob("*") if file.is_file()} == before


def test_few_cases_have_each_two_together():
    few, everything = cases(False), cases(True)
    assert len(few) < len(everything)
    assert {each[0] for each in everything} == set(KINDS)
    online = [[each[1:] for each in some if each[0] == "online"] for some in (few, everything)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        some, all_ = ({(each[one], each[other]) for each in which} for which in online)
        assert some == all_
