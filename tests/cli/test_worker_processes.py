"""A run with an environment in worker processes: it ends, leaves a checkpoint where it can, and no process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("hydra")
psutil = pytest.importorskip("psutil")

ROOT = Path(__file__).parents[2]
MAKER = """
from torchrl.envs import GymEnv, ParallelEnv

def make(num_envs):
    return ParallelEnv(num_envs, lambda: GymEnv("Pendulum-v1"), mp_start_method={method!r}, shutdown_timeout=1.0)
"""
WORDS = [
    *("size=tiny", "model=mlp", "memory=fixed", "device=cpu", "run_dir=run", "env._target_=par_env.make"),
    *("env.num_envs=2", "env.episode_length=20", "size.units=[16]", "size.encoder_units=[16]", "size.latent_dim=16"),
    *("size.actor_units=[16]", "size.critic_units=[16]", "algorithm.horizon=4", "algorithm.random_steps=8"),
    *("algorithm.first_model_updates=2", "algorithm.model_updates=1", "algorithm.actor_updates=1"),
    *("algorithm=pwm_paper", "algorithm.critic_passes=1", "algorithm.model_batch=8", "algorithm.actor_batch=8"),
    *("training.replay_capacity=2000", "training.eval_every=0", "training.eval_episodes=2", "training.video=false"),
    *("training.checkpoint_every=0", "training.progress=false", "training.threads=1"),
]
#: A run that only its end ends.
ENDLESS = "training.epochs=100000"

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and sends signals"),
    pytest.mark.usefixtures("free_signals"),
]


class Running:
    """A command as a terminal starts it: in a process group of its own, and in a folder of its own."""

    def __init__(
        self, folder: Path, method: str, *words: str, script: str = "train", before: str = "", job: str | None = None
    ) -> None:
        maker = MAKER.replace('GymEnv("Pendulum-v1")', 'Raising("Pendulum-v1")') if before else MAKER
        (folder / "par_env.py").write_text(before + maker.format(method=method))
        settings = WORDS if script in ("train", "submit", "check_env") else []
        command = [sys.executable, str(ROOT / f"launch/{script}.py"), *settings, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if job is not None:  # inside its allocation
            environment["SLURM_JOB_ID"] = job
        self.folder, self.run_dir = folder, folder / "run"
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def in_its_folder(self) -> list[psutil.Process]:
        """Itself and what it started, jobs with sessions of their own too, as long as that has not ended."""
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # ended, or not one of ours
                if Path(each.cwd()) == self.folder and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
        return found

    def workers(self) -> list[int]:
        """Of the environment that it trains in, which is the first to start any."""
        children = psutil.Process(self.process.pid).children()
        made = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
        return [each.pid for each in sorted(made, key=lambda each: (each.create_time(), each.pid))][:2]

    def has_trained(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        metrics = self.run_dir / "metrics.csv"
        return metrics.exists() and metrics.read_text().count("\n") > 2

    def end(self) -> tuple[int, str, str]:
        """Exit code and output, once the process and everything that it started are gone."""
        out, err = self.process.communicate(timeout=120)  # ends when the last process that has the pipes does
        assert "Traceback" not in out + err
        until(lambda: not self.in_its_folder())
        return self.process.returncode, out, err

    def kill(self) -> None:
        for each in self.in_its_folder():
            each.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(method: str, *words: str, **options: str | None) -> Running:
        started.append(Running(tmp_path, method, *words, **options))
        return started[-1]

    yield make
    for each in started:
        each.kill()


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def summary(run: Running) -> dict:
    return json.loads((run.run_dir / "summary.json").read_text())


def saved(run: Running) -> list[str]:
    return [path.name for path in run.run_dir.glob("checkpoints/*/checkpoint-*")]


@pytest.mark.parametrize("script", ["train", "submit"])
def test_a_run_that_fails_ends(start, script):
    where = ["cluster=local"] if script == "submit" else []
    run = start("fork", *where, "training.epochs=3", "algorithm.model_lr=1e30", script=script)
    code, _, err = run.end()
    assert code == 1
    assert "algorithm.*_lr" in err
    assert summary(run)["status"] == "failed"


def test_a_worker_that_is_killed_is_named_after_a_checkpoint(start):
    run = start("fork", ENDLESS)
    until(run.has_trained)
    worker = run.workers()[1]
    os.kill(worker, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 1
    assert "error: environment par_env.make, sub-environment 1 (seed 1): " in err
    assert f"its worker process {worker} has ended with exit code -9" in err
    found = summary(run)
    assert found["status"] == "failed"
    assert len(saved(run)) == 1


@pytest.mark.parametrize(
    ("signum", "method", "script"),
    [
        (signal.SIGINT, "fork", "train"),
        (signal.SIGTERM, "fork", "train"),
        (signal.SIGTERM, "fork", "submit"),
        pytest.param(signal.SIGINT, "fork", "submit", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "spawn", "train", marks=pytest.mark.slow),  # each worker imports everything
    ],
)
def test_a_signal_to_all_processes_stops_the_run(start, signum, method, script):
    """As a terminal sends it at Ctrl-C, or a scheduler: the workers go on until the run has saved.

    ``submit.py`` trains in its own process where it is inside of an allocation.
    """
    run = start(method, ENDLESS, script=script, job="7" if script == "submit" else None)
    until(run.has_trained)
    os.killpg(run.process.pid, signum)
    code, out, err = run.end()
    assert code == 130
    assert "the run saves its state at its next step" in out
    assert f"to resume: python launch/{script}.py" in err
    assert summary(run)["status"] == "stopped"
    assert len(saved(run)) == 1


#: Put in front of the maker: the environment that it makes raises.
RAISING = """
from torchrl.envs import GymEnv

class Raising(GymEnv):
    def _step(self, tensordict):
        raise RuntimeError("the arm fell off")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert Running(folder, "fork", "training.epochs=1").end()[0] == 0
    return folder


@pytest.fixture
def evaluated(finished: Path, tmp_path: Path) -> None:
    """A finished run, whose environments come from a module that a test may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


class TestEvaluating:
    """What opens environments outside of training closes them as training does."""

    @pytest.mark.parametrize("script", ["evaluate", "check_env"])
    def test_an_environment_that_raises(self, start, evaluated, script):
        words = ["run", "--episodes=2"] if script == "evaluate" else []
        code, _, err = start("fork", *words, script=script, before=RAISING).end()
        assert code in (1, 2)
        assert "the arm fell off" in err

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("script", ["evaluate", "check_env"])
    def test_a_signal_ends_it_and_its_workers(self, start, evaluated, script, signum):
        words = ["run", "--episodes=2"] if script == "evaluate" else ["env.num_envs=2"]
        running = start("fork", *words, script=script)
        until(lambda: running.process.poll() is not None or len(running.workers()) >= 2)
        os.killpg(running.process.pid, signum)
        code, _, _ = running.end()
        assert code in (130, 0)  # it may have been done
