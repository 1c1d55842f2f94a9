"""What is read of runs, in every state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from report_cases import write_run

from pwm_torchrl.cluster.slurm import JobState, SlurmError
from pwm_torchrl.report import collect
from pwm_torchrl.report.collect import find_runs, natural, read_run, read_runs, restart_reasons, settle
from pwm_torchrl.run import claims
from pwm_torchrl.run.claims import Identity
from pwm_torchrl.run.directory import CONFIG_FILE

ROWS = "1,128,1.5,-1300,\n2,256,3.0,-1200,-1100\n3,384,4.5,-900,-400\n4,512,6.0,-800,-500\n"


def test_a_killed_run_has_a_summary_as_old_as_its_last_evaluation(tmp_path):
    path = write_run(
        tmp_path / "a", "training.epochs=9", rows=ROWS, status="failed", epochs_done=2, epochs_planned=9,
        peak_return=-1100.0, final_return=-1100.0, env_steps=256,
    )  # fmt: skip
    assert read_run(path).last_error is None


def test_a_finished_run_is_what_its_summary_says(tmp_path):
    path = write_run(
        tmp_path / "a", "training.epochs=4", rows=ROWS, status="finished", epochs_done=4, epochs_planned=4,
        peak_return=-390.0, final_return=-500.0, random_return=-1210.0, wall_clock_s=7.5, env_steps=512,
    )  # fmt: skip
    run = read_run(path)
    assert run.finished
    assert (run.model, run.size, run.env, run.seed) == ("residual", "tiny", "pendulum", 0)
    assert (run.peak_return, run.final_return, run.random_return) == (-390.0, -500.0, -1210.0)
    assert (run.epochs_done, run.epochs_planned, run.wall_clock_s) == (4, 4, 7.5)
    assert run.last_error == "summary.json says peak_return=-390, metrics.csv says -400"
    assert run.gpu_hours is None


def test_a_summary_of_another_kind_is_told_and_not_believed(tmp_path):
    path = write_run(tmp_path / "a", rows=ROWS, status="stopped", epochs_planned=["x"], final_return="best", seed=True)
    run = read_run(path)
    assert (run.epochs_planned, run.final_return) == (run.config.training.epochs, -500.0)
    assert run.problems == ["summary.json is damaged: epochs_planned=['x'], final_return=best"]


@pytest.mark.parametrize("name", ["memory_plan.json", "job.json", "summary.json"])
def test_a_file_without_its_object_is_told(name, tmp_path):
    path = write_run(tmp_path / "a", rows=ROWS)
    (path / name).write_bytes(b'{"choices": {\xff')
    assert read_run(path).problems == [f"{name} is empty or damaged"]


def test_a_running_one_is_what_its_metrics_say(tmp_path):
    """Its summary is older, and the last row is half written."""
    path = write_run(tmp_path / "a", rows=ROWS + "5,640,7.5,-7", status="running", epochs_done=2, final_return=-1100.0)
    run = read_run(path)
    assert (run.status, run.epochs_done, run.final_return, run.peak_return) == ("running", 4, -500.0, -400.0)
    assert run.wall_clock_s == 6.0


def test_a_run_without_anything(tmp_path):
    run = read_run(write_run(tmp_path / "a", "seed=3"))
    assert (run.status, run.seed, run.final_return, run.metrics) == ("not started", 3, None, {})
    (run.path / "summary.json").write_text('{"status": "runn')
    (run.path / "metrics.csv").write_text("")
    (run.path / "events.jsonl").write_text('{"event": "sta')
    assert read_run(run.path).status == "not started"


@pytest.mark.parametrize("before", ["running", "failed", "memory", "stopped"])
def test_a_run_that_will_come_back_is_waiting(tmp_path, before):
    events = [{"event": "start"}, {"event": "restart", "reason": "memory", "attempt": 2}]
    path = write_run(tmp_path / "a", rows=ROWS, events=events, status=before, epochs_done=2)
    assert read_run(path).status == "waiting"
    with (path / "events.jsonl").open("a") as file:
        file.write('{"event": "resume", "epoch": 2}\n')
    assert read_run(path).status == before


def claimed(path: Path, owner: Identity, **outcome) -> Path:
    (path / claims.FOLDER).mkdir(exist_ok=True)
    (path / claims.FOLDER / "000001.json").write_text(json.dumps(claims.Claim(1, owner).as_dict()))
    if outcome:
        claims.outcome_file(path, 1).write_text(json.dumps(outcome))
    return path


def settled(path: Path, states=None):
    run = read_run(path)
    settle([run], states)
    return run


class TestProcessThatIsGone:
    """``kill -9`` leaves the summary's ``running`` behind."""

    here = Identity.here({})
    gone = replace(here, pid=2**22 + 1)
    far = replace(here, host="far", boot_id="other", job_id="7")

    @pytest.mark.parametrize("said", [{"status": "running", "epochs_done": 2}, {}])
    def test_it_died(self, said, tmp_path):
        path = claimed(write_run(tmp_path / "a", rows=ROWS, **said), self.gone)
        assert read_run(path).status == "running"
        run = settled(path)
        assert run.status == "died"
        assert f"process {self.gone.pid}" in str(run.last_error)
        assert "resume" in str(run.last_error)
        assert str(path) in str(run.last_error)

    def test_one_that_lives_runs(self, tmp_path):
        run = settled(claimed(write_run(tmp_path / "a", rows=ROWS, status="running"), self.here))
        assert (run.status, run.last_error) == ("running", None)

    def test_one_elsewhere_cannot_be_told(self, tmp_path):
        run = settled(claimed(write_run(tmp_path / "a", rows=ROWS, status="running"), replace(self.far, job_id=None)))
        assert (run.status, run.owner_state) == ("running", "unknown")

    @pytest.mark.parametrize(
        ("states", "status"),
        [
            ({"7": JobState("7", "RUNNING")}, "running"),
            ({"7": JobState("7", "PENDING", "Resources")}, "waiting"),
            ({"7": JobState("7", "CANCELLED")}, "died"),
            ({}, "died"),
        ],
    )
    def test_slurm_is_asked_for_jobs_elsewhere_once(self, states, status, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(collect, "job_states", lambda ids: asked.append(list(ids)) or states)
        runs = [read_run(claimed(write_run(tmp_path / n, rows=ROWS, status="running"), self.far)) for n in "ab"]
        settle(runs)
        assert [run.status for run in runs] == [status] * 2
        assert asked == [["7", "7"]]
        settle(runs, states)
        assert len(asked) == 1

    def test_without_an_answer_it_is_as_it_says(self, tmp_path, monkeypatch):
        def silent(ids):
            raise SlurmError("SLURM did not answer")

        monkeypatch.setattr(collect, "job_states", silent)
        run = settled(claimed(write_run(tmp_path / "a", rows=ROWS, status="running"), self.far))
        assert (run.status, run.owner_state) == ("running", "unknown")

    @pytest.mark.parametrize("summary", ["", '{"status": "runn', "[]", b"\xff\xfe\x00"])
    def test_a_damaged_summary_is_told_and_the_attempt_says_how_it_ended(self, summary, tmp_path):
        path = claimed(write_run(tmp_path / "a", rows=ROWS), self.gone, status="finished", epoch=4)
        (path / "summary.json").write_bytes(summary if isinstance(summary, bytes) else summary.encode())
        run = settled(path)
        assert (run.status, run.final_return, run.epochs_done) == ("finished", -500.0, 4)
        assert "summary.json" in str(run.last_error)

    def test_a_summary_that_could_not_be_written_at_the_end(self, tmp_path):
        path = claimed(write_run(tmp_path / "a", rows=ROWS, status="running"), self.gone, status="storage")
        assert settled(path).status == "storage"

    def test_a_damaged_claim_is_told(self, tmp_path):
        path = claimed(write_run(tmp_path / "a", rows=ROWS, status="running"), self.gone)
        (path / claims.FOLDER / "000001.json").write_text("")
        run = settled(path)
        assert run.status == "running"
        assert "000001.json" in str(run.last_error)


@pytest.mark.parametrize("rows", [b"", b"epoch,env_st", b"\0" * 64, b"\xff\xfe\n\x80,1\n", b"epoch\n1\nx\n"])
def test_damaged_metrics_hide_nothing_else(rows, tmp_path):
    path = write_run(tmp_path / "a", status="finished", final_return=-5.0, epochs_done=3)
    (path / "metrics.csv").write_bytes(rows)
    run = read_run(path)
    assert (run.status, run.final_return, run.epochs_done) == ("finished", -5.0, 3)


def test_runs_are_as_old_as_their_first_event(tmp_path):
    times = [{"event": "start", "time": f"2026-11-0{day}T10:00:00+00:00"} for day in (2, 3)]
    path = write_run(tmp_path / "a", events=[{"event": "torn"}, *times])
    assert read_run(path).started == 1793613600.0
    assert read_run(write_run(tmp_path / "b")).started == pytest.approx((tmp_path / "b" / CONFIG_FILE).stat().st_mtime)


def test_a_queued_run_is_waiting(tmp_path):
    assert read_run(write_run(tmp_path / "a", events=[{"event": "submit", "job_id": "12_3"}])).status == "waiting"


def test_restarts_and_why():
    events = [{"event": "restart", "reason": reason} for reason in ("timeout", "memory", "timeout")]
    assert restart_reasons([{"event": "start"}, *events], 3) == {"timeout": 2, "memory": 1}
    assert restart_reasons(events, 5) == {"timeout": 2, "memory": 1, "by_hand": 2}
    assert restart_reasons(events, 2).total() == 3  # the third died before it could write its summary
    assert restart_reasons([], 0) == {}


def test_the_last_error_is_that_of_the_newest_attempt(tmp_path):
    events = [{"event": "memory", "error": "OutOfMemory: first"}, {"event": "micro_batch", "error": "no end of a run"}]
    path = write_run(tmp_path / "a", rows=ROWS, events=events, status="running")
    assert read_run(path).last_error == "OutOfMemory: first"
    attempts = path / "attempts"
    attempts.mkdir()
    for number, error in ((9, "ninth"), (10, "tenth\n  in two lines"), (11, None)):
        (attempts / f"{number:06}.outcome.json").write_text(json.dumps({"status": "failed", "error": error}))
    (attempts / "000012.outcome.json").write_text("{")
    assert read_run(path).last_error == "tenth in two lines"


def test_files_that_cannot_be_read_are_told(tmp_path):
    path = write_run(tmp_path / "a", rows="1,128,x,y,z\n", status="running", env="pendulum", model="mlp")
    (path / CONFIG_FILE).write_text("model: {name: mlp, colour: blue}\nrun_dir: null\n")
    run = read_run(path)
    assert run.config is None
    assert run.model == "mlp"
    assert "colour" in str(run.last_error)
    assert "metrics.csv is damaged: 3 cells without a number" in str(run.last_error)


def test_memory_against_plan(tmp_path):
    path = write_run(tmp_path / "a", status="finished", peak_host_bytes=900, peak_own_bytes=500)
    plan = {"prediction": {"totals": {"host": 700, "device": 0}, "base": 300}, "measured": None}
    (path / "memory_plan.json").write_text(json.dumps(plan))
    run = read_run(path)
    assert (run.host_bytes, run.host_planned, run.device_planned) == (500, 700, None)
    # The kernel's own peak, above what the process held before, misses nothing.
    (path / "memory_plan.json").write_text(json.dumps({**plan, "measured": {"host": 320}}))
    assert read_run(path).host_bytes == 620


def test_memory_while_it_runs(tmp_path):
    path = write_run(tmp_path / "a")
    columns = "epoch,memory/own,memory/peak_own,memory/gpu_allocated,memory/gpu_peak_allocated\n"
    (path / "metrics.csv").write_text(columns + "1,10,20,5,50\n2,15,30,6,60\n")
    run = read_run(path)
    assert (run.host_bytes, run.device_bytes, run.gpus) == (30, 60, 1)


def test_gpus_are_those_of_the_job(tmp_path):
    path = write_run(tmp_path / "a", status="finished", wall_clock_s=1800.0, peak_device_bytes=10)
    assert read_run(path).gpu_hours == 0.5
    (path / "job.json").write_text(json.dumps({"gpus": 4}))
    assert read_run(path).gpu_hours == 2.0


def test_runs_are_found_once_and_in_depth(tmp_path, monkeypatch):
    for name in ("a", "b/c", "b/d/e"):
        write_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert len(find_runs([Path("runs"), Path("runs/a"), Path(), Path("runs/b/d")])) == 3


def test_what_only_looks_like_a_run_is_none(tmp_path):
    """A copy of the code below the runs, or in one of them, has a ``config.yaml`` too."""
    write_run(tmp_path / "run")
    for folder in ("code/configs", "run/code/configs", ".snapshots/1/configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / CONFIG_FILE).write_text("# groups\ndefaults:\n  - model: mlp\n")
    (tmp_path / "other_project").mkdir()
    (tmp_path / "other_project" / CONFIG_FILE).write_text("seed: 1\nlearning_rate: 3\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / CONFIG_FILE).write_text("")
    write_run(tmp_path / ".trash" / "old")
    assert find_runs([tmp_path]) == [tmp_path / "run"]


def test_a_run_with_half_a_configuration_is_still_one(tmp_path):
    text = (write_run(tmp_path / "whole") / CONFIG_FILE).read_text()
    (write_run(tmp_path / "half") / CONFIG_FILE).write_text(text[:300])
    (write_run(tmp_path / "empty", status="running") / CONFIG_FILE).write_text("")
    assert [path.name for path in find_runs([tmp_path])] == ["empty", "half", "whole"]
    assert CONFIG_FILE in str(read_run(tmp_path / "half").last_error)


def test_names_tell_runs_apart(tmp_path):
    for name in ("mlp/seed0", "flow/seed0"):
        write_run(tmp_path / name)
    assert [run.name for run in read_runs(find_runs([tmp_path]))] == ["flow/seed0", "mlp/seed0"]
    assert [run.name for run in read_runs([tmp_path / "mlp" / "seed0"])] == ["seed0"]


def test_reading_order():
    assert sorted(["48m", "5m", "tiny", "19m"], key=natural) == ["5m", "19m", "48m", "tiny"]
    assert sorted([10, 9, None], key=natural) == [9, 10, None]
