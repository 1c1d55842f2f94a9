"""Jobs through submitit's own local executor, with a training function that learns nothing."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from training_stub import BAD_INPUT, BUG, FAULT, KILLED, NO_DISK, NO_MEMORY, SLOW

pytest.importorskip("submitit")

import yaml
from forked_commands import Command, run

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cluster.resources import Resources

main = partial(run_command, "submit")

pytestmark = pytest.mark.usefixtures("stub_training", "workdir", "free_signals")


def test_the_last_lines_are_the_result_and_what_to_type_next(capfd):
    assert main(["run_dir=run", "training.epochs=3"]) == 0
    out = capfd.readouterr().out
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("epoch ")] == ["epoch 1", "epoch 2", "epoch 3"]
    assert "fresh no state file" in lines  # no terminal here, so nothing draws
    assert "done" in lines  # stderr is shown too
    assert lines[-4].startswith("pendulum residual tiny seed 0: finished · final return -120.0 (peak -100.0, random")
    assert lines[-3:] == ["next:", "  python launch/evaluate.py run", "  python launch/report.py run"]
    assert "submitit" not in out.replace("submitit/", "")
    assert (Path("run") / "log.txt").read_text().startswith("fresh")


@pytest.mark.parametrize("words", [["cluster=h100"], []], ids=" ".join)
def test_a_profile_that_cannot_be_queued_is_told(words, capfd, monkeypatch):
    """Inside an allocation where SLURM's commands are not found, as in a container."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main([*words, "seed=1,2", "--dry-run"]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "cluster=h100 is ignored" in line]
    assert len(told) == len(words)
    assert all("job 7" in line and "2 runs one after the other" in line for line in told)


def test_pickle_holds_only_the_run_directory(capfd):
    assert main(["run_dir=run", "training.epochs=1"]) == 0
    (submitted,) = Path("run/submitit/attempt_1").glob("*_submitted.pkl")
    with open(submitted, "rb") as stream:
        job = pickle.load(stream)
    assert (job.function.__module__, job.function.__name__) == ("pwm_torchrl.cluster.job", "run_job")
    assert job.args == (str(Path("run").absolute()),)
    assert job.kwargs == {}


@pytest.mark.parametrize(
    ("seed", "code", "sentence"),
    [
        (FAULT, 1, "error: pendulum, seed 3: reward is nan"),
        (BUG, 1, "error: KeyError: 'a bug"),
        (KILLED, 1, "killed from outside, or ran out of memory"),
    ],
)
def test_an_error_is_a_few_lines(capfd, seed, code, sentence):
    assert main(["run_dir=run", f"seed={seed}"]) == code
    out, err = capfd.readouterr()
    assert sentence in err
    assert "full log:" in err
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) <= 4
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"
    assert ("Traceback" in Path("run/log.txt").read_text()) == (seed != KILLED)


def test_what_training_refuses_leaves_no_directory(capfd):
    """Unless it was there before."""
    assert main([f"seed={BAD_INPUT}"]) == 2
    assert capfd.readouterr().err == "error: algorithm.horizon=9 is longer than an episode\n"
    assert [each.name for each in Path("runs").iterdir()] == [".code"]
    Path("run").mkdir()
    assert main(["run_dir=run", f"seed={BAD_INPUT}"]) == 2
    assert f"full log: {Path('run/log.txt').absolute()}" in capfd.readouterr().err
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("seed", "code", "status", "sentence", "remedy"),
    [
        (NO_MEMORY, 75, "memory", "the critic update does not fit", "with more memory"),
        (NO_DISK, 74, "storage", "could not write segment_000001.bin", "after freeing disk space"),
    ],
)
def test_without_memory_or_disk_it_says_how_to_resume(capfd, seed, code, status, sentence, remedy):
    assert main(["run_dir=run", f"seed={seed}"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"error: {sentence}"
    assert lines[1].startswith("full log: ")
    assert lines[2].startswith(f"to resume {remedy}")
    assert lines[2].endswith(f": python launch/submit.py seed={seed} run_dir={Path('run').absolute()}")
    assert len(lines) == 3
    outcome = json.loads(Path("run/submitit/attempt_1/outcome.json").read_text())
    assert (outcome["status"], outcome["error"]) == (status, sentence)
    assert json.loads(Path("run/summary.json").read_text())["status"] == status


def test_a_job_whose_disk_takes_no_summary_still_tells(capfd, monkeypatch):
    """The outcome is written beside it; here only the summary cannot be."""
    from pwm_torchrl.cluster import job
    from pwm_torchrl.run.directory import prepare_run_dir

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "set_status", full)
    run = prepare_run_dir(compose(["run_dir=run"]))
    job._tell(run.path, {"status": "storage"}, run.path / "outcome.json")
    assert json.loads((run.path / "outcome.json").read_text())["status"] == "storage"
    assert "summary.json could not be written ([Errno 28] No space left on device)" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_job_and_the_same_command_resumes(signum):
    words = [f"seed={SLOW}", "training.epochs=300", "run_dir=run"]
    process = Command("submit", *words)
    _wait_for(lambda: Path("run/metrics.csv").exists() and Path("run/metrics.csv").read_text().count("\n") > 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # to its whole group: what a terminal does at Ctrl-C
    else:
        process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "saving" in out
    assert "to resume: python launch/submit.py seed=5 training.epochs=300 run_dir=" in err
    assert "Traceback" not in out + err
    assert json.loads(Path("run/summary.json").read_text())["status"] == "stopped"
    _wait_for(lambda: not _alive(int(Path("run/submitit/attempt_1/pid").read_text())))

    again = run("submit", *words)
    assert again.returncode == 0, again.stderr
    assert "resuming:" in again.stdout
    assert "fresh" not in again.stdout
    epochs = [int(line.split(",")[0]) for line in Path("run/metrics.csv").read_text().splitlines()[1:]]
    assert epochs == list(range(1, 301))
    assert Path("run/submitit/attempt_2").is_dir()

    finished = run("submit", *words)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "finished run" in finished.stderr


def test_a_second_ctrl_c_kills():
    process = Command("submit", f"seed={SLOW}", "training.epochs=300", "run_dir=run")
    _wait_for(lambda: Path("run/metrics.csv").exists() and Path("run/metrics.csv").read_text().count("\n") > 2)
    process.send_signal(signal.SIGINT)
    _wait_for(lambda: "saving" in Path("run/log.txt").read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(Path("run/summary.json").read_text())["status"] == "stopped"
    _wait_for(lambda: not _alive(int(Path("run/submitit/attempt_1/pid").read_text())))


def test_a_directory_whose_job_still_runs_is_refused(capfd):
    words = [f"seed={SLOW}", "training.epochs=300", "run_dir=run"]
    process = Command("submit", *words)
    _wait_for(lambda: Path("run/metrics.csv").exists())
    process.kill()  # the job lives on
    process.wait()
    assert main(words) == 2
    pid = int(Path("run/submitit/attempt_1/pid").read_text())
    assert f"still running here, process {pid}" in capfd.readouterr().err
    os.kill(pid, signal.SIGTERM)
    _wait_for(lambda: not _alive(pid))
    assert json.loads(Path("run/summary.json").read_text())["status"] == "stopped"
    assert main(words) == 0


def test_debug_runs_in_this_process(capfd, stub_training, monkeypatch):
    seen = []
    monkeypatch.setattr(stub_training, "train", lambda *a, **k: seen.append(os.getpid()) or {"status": "finished"})
    assert main(["run_dir=run", "cluster=debug"]) == 0
    assert seen == [os.getpid()]


def test_the_job_sees_the_gpus_that_the_user_sees(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    from pwm_torchrl.cli.local import _job_environment
    from pwm_torchrl.cluster.job import CUDA_VARIABLE, restore_cuda

    with _job_environment([]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what submitit's local executor does
        assert os.environ[CUDA_VARIABLE] == "3"
        restore_cuda()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        assert CUDA_VARIABLE not in os.environ


def _wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dry_run_prints_the_configuration_last_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["model=mlp", "training.steps=1e4", "seed=1,2", "cluster=local", "--dryrun"]) == 0
    out = capsys.readouterr().out
    sections = [line for line in out.splitlines() if line.startswith("# ")]
    assert sections == [
        "# runs",
        "# length of the first of 2 runs",
        "# memory plan of model=mlp size=tiny",
        "# submitted to: local, no sbatch",
        "# configuration of the first of 2 runs",
    ]
    assert "79 epochs = 10,112 environment steps (training.steps=10,000)" in out
    assert max(map(len, out.splitlines())) <= 80
    shown = yaml.safe_load(out.partition(sections[-1])[2])
    assert (shown["training"]["epochs"], shown["training"]["steps"]) == (79, 10_000)
    assert list(Path().iterdir()) == []


def test_a_dry_run_prints_what_sbatch_gets_before_the_configuration(capsys, monkeypatch):
    """Without SLURM: with the resources that its nodes would be found to have."""
    from pwm_torchrl.cli import prepare
    from pwm_torchrl.memory.plan import make_plan, profile_budgets
    from pwm_torchrl.run.stored_episodes import run_facts

    def planned(runs):
        config = runs[0].config
        return [make_plan(config, run_facts(config), profile_budgets(config))], Resources(
            mem_mb=4096, cpus=4, gpus=0, nodes=1, time_min=30
        )

    monkeypatch.setattr(prepare, "slurm_available", lambda: True)
    monkeypatch.setattr("pwm_torchrl.cli.prepare.plan_for_slurm", planned)
    words = ["model=mlp", "seed=1,2", "cluster=cpu", "cluster.setup=['module load cuda','ulimit -n 4096']"]
    assert main([*words, "--dry_run"]) == 0
    sbatch = capsys.readouterr().out.partition("\n# sbatch, one array of 2\n")[2].partition("\n\n# configuration")[0]
    assert "  mem: 4096M" in sbatch.splitlines()
    assert "  setup:\n    module load cuda\n    ulimit -n 4096\n" in sbatch
