"""Environments with worker processes: shielded from signals, ended within seconds, named when they die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pwm_torchrl.envs import workers
from pwm_torchrl.envs.workers import OpenEnv

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """What every scenario of worker_scenarios.py found, one after the other in one process."""
    if not sys.platform.startswith("linux"):
        pytest.skip("forks, and reads /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("worker_scenarios.py"))]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestSignals:
    @pytest.mark.parametrize("kind", ["spawned", "forked", "asynchronous"])
    def test_workers_are_shielded_and_close_in_order(self, ran, kind):
        assert ran[kind] == {
            "workers": 2, "before": 3, "after": 3, "alive": [True, True], "closed": True, "left": [False, False]
        }  # fmt: skip

    def test_this_process_is_not(self, ran):
        assert ran["mask"] == []


class TestDeadWorkers:
    @pytest.mark.parametrize("kind", ["killed", "killed_asynchronous"])
    def test_are_named(self, ran, kind):
        found = ran[kind]
        assert (found["seed"], found["index"]) == (41, 1)
        assert found["message"] == (
            f"environment pendulum, sub-environment 1 (seed 41): its worker process {found['pids'][1]} has ended with "
            "exit code -9"
        )

    @pytest.mark.parametrize("kind", ["killed", "killed_asynchronous", "hanging"])
    def test_the_others_end(self, ran, kind):
        assert ran[kind]["left"] == [False, False]

    def test_none_outlives_an_environment_that_could_not_be_opened(self, ran):
        assert ran["failing"] == {"workers": 2, "left": [False, False]}


class Batch:
    """An environment of one worker, which closes as a test says."""

    is_closed = False

    def __init__(self, close=lambda: None, worker: bool = True) -> None:
        self._close = close
        if worker:
            self.worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
            self.worker.start()

    def close(self) -> None:
        self._close()
        self.is_closed = True


def opened(env: Batch) -> OpenEnv:
    made = OpenEnv("toy", 0)
    made.hold(env)
    made.workers = [env.worker] if hasattr(env, "worker") else []
    return made


def bug() -> None:
    raise ZeroDivisionError("in close")


class TestClosing:
    @pytest.mark.parametrize("worker", [True, False])
    def test_an_error_is_told_once_everything_is_closed(self, worker):
        env = Batch(bug, worker)
        with pytest.raises(ZeroDivisionError, match="in close"):
            opened(env).close()
        if worker:
            assert env.worker.exitcode == -signal.SIGKILL

    def test_but_not_where_a_worker_had_died_before(self):
        env = Batch(bug)
        env.worker.kill()
        env.worker.join()
        opened(env).close()

    def test_one_that_never_closes(self, monkeypatch):
        monkeypatch.setattr(workers, "CLOSE_S", 0.1)
        env = Batch(lambda: time.sleep(60))
        opened(env).close()
        assert env.worker.exitcode == -signal.SIGKILL
        assert not env.is_closed

    def test_twice(self):
        calls = []
        made = opened(Batch(lambda: calls.append(1), worker=False))
        made.close()
        made.close()
        assert calls == [1]

    def test_an_environment_that_is_closed_already(self):
        env = Batch(bug, worker=False)
        env.is_closed = True
        opened(env).close()

    def test_other_errors_stay_what_they_are(self):
        made = opened(Batch())
        with pytest.raises(KeyError, match="a bug"), made.naming_dead_workers():
            raise KeyError("a bug")
        made.close()
