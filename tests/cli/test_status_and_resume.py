"""What is said of runs, and which of them are brought back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pwm_torchrl.cli import console, resume, status, submit
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cluster.slurm import JobState
from pwm_torchrl.config import Config
from pwm_torchrl.report.collect import read_run
from pwm_torchrl.run import claims
from pwm_torchrl.run.claims import Identity
from pwm_torchrl.run.directory import load_config, save_config, write_event

RUNNING = JobState("7", "RUNNING", nodes="n1")
QUEUED = JobState("7", "PENDING", "Priority")
HELD = JobState("7", "PENDING", "launch failed requeued held")
OVER = JobState("7", "CANCELLED")


@pytest.fixture
def run(tmp_path):
    """A run that stopped half way, as SLURM's job 7."""
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = Config(env={"name": "pole", "_target_": "pole.make", "num_envs": 2})
    cfg.model.name, cfg.size.name = "mlp", "tiny"
    cfg.size.latent_dim, cfg.size.units, cfg.size.encoder_units = 8, [8], [8]
    cfg.training.epochs = 10
    save_config(cfg, folder)
    write_summary(folder, "stopped")
    (folder / "metrics.csv").write_text("epoch,time/epoch_s\n4,60\n5,60\n")
    (folder / "job.json").write_text(json.dumps({"job_ids": ["7"], "mem_mb": 2000}))
    return folder


def write_summary(folder, said):
    content = {"status": said, "epochs_done": 5, "epochs_planned": 10, "peak_own_bytes": 2**30, "restarts": 0}
    (folder / "summary.json").write_text(json.dumps(content))


class TestStatus:
    @pytest.mark.parametrize(
        ("job", "shown", "left"),
        [(RUNNING, "running", "5 min"), (QUEUED, "queued", "-"), (HELD, "held", "-"), (OVER, "stopped", "-"),
         (None, "stopped", "-")],
    )  # fmt: skip
    def test_a_line(self, job, shown, left, run):
        name, said, where, restarts, progress, time_left, memory, _ = status.line_of(read_run(run), job)
        assert (name, said, restarts, progress, time_left) == ("run", shown, "0", "5/10 50 %", left)
        assert where == ("-" if job is None else f"7 {job.state.lower()}" + (" on n1" if job is RUNNING else ""))
        assert memory.startswith("1 GiB")

    def test_files_that_cannot_be_read_are_named_below_the_table(self, run, capsys):
        (run / "memory_plan.json").write_text("")
        (run / "metrics.csv").write_text("epoch,time/epoch_s\n4,60\n5,6o\n")
        (run / "job.json").write_text(json.dumps({"job_ids": {"a": 1}, "mem_mb": 2000}))
        assert run_command("status", [str(run)]) == console.OK
        said = capsys.readouterr()
        assert "5/10 50 %" in said.out
        for told in ("memory_plan.json is empty or damaged", "metrics.csv is damaged", "job.json is damaged: job_ids="):
            assert f"run: {told}" in said.err

    @pytest.mark.parametrize("when", [None, "yesterday", 5, "2026-11-29T10:00:00"])
    def test_an_event_without_its_time(self, when, run):
        with (run / "events.jsonl").open("w") as file:
            file.write(json.dumps({"event": "failed", "error": "boom", "time": when}) + "\n")
        assert status.line_of(read_run(run), None)[-1].startswith("boom")

    def test_restarts_and_the_last_reason(self, run):
        for reason in ("timeout", "memory", "timeout"):
            write_event(run, "restart", reason=reason, detail=f"because of {reason}", attempt=1, answer="requeue")
        line = status.line_of(read_run(run), RUNNING)
        assert line[3] == "3: 2 timeout, 1 memory"
        assert line[-1].startswith("because of timeout (")

    def test_a_held_job_says_what_to_do(self, run):
        assert status.line_of(read_run(run), HELD)[-1] == (
            "launch failed requeued held; let it go on with: scontrol release 7"
        )

    @pytest.mark.parametrize(
        ("states", "said"),
        [
            ({"7": OVER}, "cancelled"),
            ({"7": QUEUED}, "queued"),
            ({"7": JobState("7", "FAILED")}, "not"),
            ({}, "cancelled"),  # SLURM has forgotten it
        ],
    )
    def test_a_job_that_never_began(self, run, states, said, monkeypatch, capsys):
        for file in ("summary.json", "metrics.csv"):
            (run / file).unlink()
        monkeypatch.setattr(status, "job_states", lambda ids: states)
        assert run_command("status", [str(run)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].split()[1] == said

    def test_a_job_that_left_traces_was_not_cancelled(self, run, monkeypatch, capsys):
        for file in ("summary.json", "metrics.csv"):
            (run / file).unlink()
        (run / "attempts").mkdir()
        (run / "attempts" / "evidence-7-0-0.json").write_text("{}")
        monkeypatch.setattr(status, "job_states", lambda ids: {})
        assert run_command("status", [str(run)]) == 0
        assert "cancelled" not in capsys.readouterr().out

    def test_slurm_is_asked_once_for_all(self, run, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(status, "job_states", lambda ids: asked.append(list(ids)) or {"7": RUNNING})
        assert run_command("status", [str(run.parent)]) == 0
        assert asked == [["7"]]
        assert "7 running on n1" in capsys.readouterr().out

    def test_a_process_that_is_gone_is_not_running(self, run, monkeypatch, capsys):
        """Killed with -9: nothing is left to take, and what to do is said."""
        write_summary(run, "running")
        (run / "job.json").unlink()
        (run / claims.FOLDER).mkdir()
        here = Identity.here({})
        claim = run / claims.FOLDER / "000001.json"
        for owner, shown, said in (
            (here, "running", ""),
            (replace(here, pid=2**22 + 1), "died", "resume"),
            (replace(here, host="far"), "running", "process"),
        ):
            claim.write_text(json.dumps(claims.Claim(1, owner).as_dict()))
            assert run_command("status", [str(run)]) == 0
            line = capsys.readouterr().out.splitlines()[-1]
            assert line.split()[1] == shown
            assert ("5 min" in line) == (shown == "running")
            assert said in line

    def test_a_narrow_terminal(self, run, monkeypatch, capsys):
        monkeypatch.setattr(console, "terminal_width", lambda: 40)
        monkeypatch.setattr(status, "job_states", lambda ids: {"7": RUNNING})
        write_event(run, "restart", reason="memory", detail="a long story " * 5, attempt=1, answer="requeue")
        assert run_command("status", [str(run)]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 40

    def test_without_an_answer_the_rest_is_shown(self, run, monkeypatch, capsys):
        def silent(ids):
            raise status.SlurmError("SLURM did not answer squeue within 20 s")

        monkeypatch.setattr(status, "job_states", silent)
        assert run_command("status", [str(run)]) == 0
        out, err = capsys.readouterr()
        assert "5/10 50 %" in out
        assert "did not answer" in err


class TestResume:
    @pytest.mark.parametrize(
        ("said", "job", "failed", "reason"),
        [
            ("finished", None, False, "finished"),
            ("stopped", RUNNING, False, "job 7 is running"),
            ("stopped", QUEUED, False, "job 7 is pending"),
            ("stopped", HELD, False, "job 7 is held; let it go on with: scontrol release 7"),
            ("failed", OVER, False, "failed; --failed tries it again"),
            ("failed", OVER, True, None),
            ("stopped", OVER, False, None),
            ("running", OVER, False, None),
            ("memory", None, False, None),
        ],
    )
    def test_who_is_left_alone(self, said, job, failed, reason, run):
        write_summary(run, said)
        assert resume.reason_to_leave(run, job, failed=failed) == reason

    def test_nor_is_one_whose_process_lives(self, run):
        (run / claims.FOLDER).mkdir()
        here = Identity.here({})
        for owner, alone in ((here, True), (replace(here, pid=2**22 + 1), False), (replace(here, host="far"), True)):
            content = json.dumps(claims.Claim(1, owner).as_dict())
            (run / claims.FOLDER / "000001.json").write_text(content)
            reason = resume.reason_to_leave(run, None, failed=False)
            assert (reason is not None) == alone
            if alone:
                assert f"process {owner.pid} on {owner.host} trains it" in reason


class TestSettings:
    def test_a_finished_run_may_become_longer(self, run):
        write_summary(run, "finished")
        assert resume.reason_to_leave(run, None, failed=False, longer=True) is None
        config = resume.changed(run, ["training.epochs=20", "cluster.mem_gib=3"])
        assert (config.training.epochs, config.cluster.mem_gib) == (20, 3.0)

    def test_steps_say_the_length_too(self, run):
        cfg = load_config(run)
        cfg.env = {
            "_target_": "pwm_torchrl.envs.make_gymnasium_env",
            "id": "Pendulum-v1",
            "num_envs": 2,
            "action_repeat": 1,
        }
        save_config(cfg, run)
        assert resume.changed(run, ["training.steps=100000"]).training.epochs > 10

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("training.epochs=5", "training.epochs (10 there)"),
            ("algorithm.horizon=3", "algorithm.horizon (16 there)"),
            ("training.epoch=20", "training.epoch"),
            ("training.epochs=many", "training.epochs=many"),
            ("training.epochs=-1", "training.epochs=-1"),
        ],
    )
    def test_what_makes_it_another_run_is_refused_and_the_others_go_on(self, word, said, run, capsys):
        (run / "job.json").unlink()
        before = (run / "config.yaml").read_text()
        assert run_command("resume", [str(run), word]) == 1
        assert said in capsys.readouterr().err
        assert (run / "config.yaml").read_text() == before

    def test_without_a_run(self, capsys):
        assert run_command("resume", ["training.epochs=20"]) == 2
        assert "no run directory" in capsys.readouterr().err


class TestWhatEndedIt:
    def test_a_run_that_fails_is_told_with_its_reason(self, run, monkeypatch, capsys):
        (run / "job.json").unlink()
        monkeypatch.setattr(submit, "preflight", lambda *args, **kwargs: [])
        monkeypatch.setattr(submit, "snapshot", lambda *args: [])

        class Failing:
            def follow(self):
                return {"status": "failed", "error": "the arm fell off"}

        monkeypatch.setattr(submit, "submit_local", lambda *args, **kwargs: Failing())
        assert run_command("resume", [str(run)]) == 1
        said = capsys.readouterr().err
        assert "failed: the arm fell off" in said
        assert "log.txt" in said

    def test_a_damaged_job_file_is_not_taken_for_a_run_of_this_machine(self, run, capsys):
        (run / "job.json").write_text("")
        assert run_command("resume", [str(run)]) == 1
        said = capsys.readouterr().err
        assert "job.json is empty or damaged" in said
        assert f"run_dir={run}" in said

    def test_a_module_that_is_not_found_leaves_the_run_as_it_was(self, run, capsys):
        (run / "job.json").unlink()
        before = {file.name: file.read_bytes() for file in run.iterdir()}
        assert run_command("resume", [str(run)]) == 1
        assert "'pole'" in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in run.iterdir()} == before

    def test_a_damaged_claim_is_told_of_and_the_others_go_on(self, run, capsys):
        (run / "job.json").unlink()
        (run / claims.FOLDER).mkdir()
        (run / claims.FOLDER / "000001.json").write_text("")
        assert run_command("resume", [str(run)]) == 1
        assert "000001.json is not a claim" in capsys.readouterr().err
        assert run_command("status", [str(run)]) == 0
        (run / claims.FOLDER / "000001.outcome.json").write_text('{"status": "stopped"}')  # it has ended
        assert resume.reason_to_leave(run, None, failed=False) is None
