"""What is said of runs, and which of them are brought back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pwm_torchrl.cli import console, resume, status, submit
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cluster.resources import Resources
from pwm_torchrl.cluster.slurm import JobState
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
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
            "launch failed requeued held; release it with: scontrol release 7"
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
            ("stopped", HELD, False, "job 7 is held; release it with: scontrol release 7"),
            ("failed", OVER, False, "failed; --failed resumes it"),
            ("failed", OVER, True, None),
            ("stopped", OVER, False, None),
            ("running", OVER, False, None),
            ("memory", None, False, None),
        ],
    )
    def test_who_is_left_alone(self, said, job, failed, reason, run):
        write_summary(run, said)
        assert resume.reason_not_to_resume(run, job, failed=failed) == reason

    def test_nor_is_one_whose_process_lives(self, run):
        (run / claims.FOLDER).mkdir()
        here = Identity.here({})
        for owner, alone in ((here, True), (replace(here, pid=2**22 + 1), False), (replace(here, host="far"), True)):
            content = json.dumps(claims.Claim(1, owner).as_dict())
            (run / claims.FOLDER / "000001.json").write_text(content)
            reason = resume.reason_not_to_resume(run, None, failed=False)
            assert (reason is not None) == alone
            if alone:
                assert f"process {owner.pid} on {owner.host} is training it" in reason


class TestSettings:
    def test_a_finished_run_may_become_longer(self, run):
        write_summary(run, "finished")
        assert resume.reason_not_to_resume(run, None, failed=False, longer=True) is None
        config = resume.changed_config(run, ["training.epochs=20", "cluster.mem_gib=3"])
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
        assert resume.changed_config(run, ["training.steps=100000"]).training.epochs > 10

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

    @pytest.mark.parametrize(
        ("word", "parts"),
        [
            ("logger.project=mine", ["logger.project=mine", "logger.kind=csv"]),
            ("model.num_bins=101", ["model.num_bins=101", "model.reward_head=scalar"]),
            ("runs_dir=there", ["runs_dir=there", "run_dir="]),
            ("run_dir=there", ["run_dir=there", "is ignored"]),
            ("cluster.kind=local", ["cluster.kind=local", "cluster=NAME"]),
            ("cluster=l40s", ["cluster=l40s", "single keys", "cluster."]),
            ("experiment=pretrain", ["experiment=pretrain", "single keys"]),
            ("cluster.mem_gib=8,9", ["cluster.mem_gib=8,9", "several runs"]),
        ],
    )
    def test_what_means_nothing_is_refused(self, word, parts, run):
        with pytest.raises(ConfigurationError) as caught:
            resume.changed_config(run, [word])
        for part in parts:
            assert part in str(caught.value)

    def test_settings_are_written_as_for_a_new_run(self, run):
        cfg = load_config(run)
        cfg.cluster.time_min = 60
        save_config(cfg, run)
        config = resume.changed_config(run, ["training.epochs=1e2", "cluster.time=2:00:00", "cluster.sbatch.nice=5"])
        assert (config.training.epochs, config.cluster.time_min, config.cluster.sbatch) == (100, 120, {"nice": 5})

    def test_without_a_run(self, capsys):
        assert run_command("resume", ["training.epochs=20"]) == 2
        assert "no run directory" in capsys.readouterr().err


class TestResources:
    """What a job asks for that comes back: an explicit setting wins over what its last job had."""

    @pytest.fixture
    def asked(self, run, monkeypatch):
        """The resources that are asked for, and the run's configuration then."""
        found = []
        before = Resources(mem_mb=2000, cpus=2, gpus=0, nodes=1, time_min=60)
        (run / "job.json").write_text(json.dumps({"job_ids": ["7"], "code": [], **before.as_dict()}))
        for name, stand_in in {
            "slurm_available": lambda: True,
            "preflight": lambda *args, **kwargs: [],
            "site": lambda: None,
            "require_fit": lambda *args: None,
            "resubmit": lambda folder, cfg, resources, job: found.append((resources, load_config(folder))) or "8",
        }.items():
            monkeypatch.setattr(submit, name, stand_in)
        monkeypatch.setattr(resume, "job_states", lambda ids: {"7": OVER})
        return found

    @pytest.mark.parametrize(
        ("words", "changed"),
        [
            ([], {}),
            (["cluster.mem_gib=8"], {"mem_mb": 8192}),
            (["cluster.mem_gib=null"], {}),
            (["cluster.host_gib=1"], {"mem_mb": 1024}),
            (["cluster.host_gib=8"], {}),
            (["cluster.cpus=6"], {"cpus": 6}),
            (["training.threads=4"], {"cpus": 4}),
            (["cluster.nodes=2"], {"nodes": 2}),
            (["cluster.gpus=1", "cluster.gpu=l40s"], {"gpus": 1}),
            (["cluster.time=2:00:00"], {"time_min": 120}),
            (["cluster.time_min=90"], {"time_min": 90}),
            (["cluster.max_time_min=30"], {"time_min": 30}),
            (["cluster.partition=main"], {}),
        ],
        ids=" ".join,
    )
    def test_an_explicit_setting_wins(self, words, changed, run, asked):
        assert run_command("resume", [str(run), *words]) == 0
        ((resources, config),) = asked
        assert resources == replace(Resources(mem_mb=2000, cpus=2, gpus=0, nodes=1, time_min=60), **changed)
        assert config.cluster.partition == ("main" if "cluster.partition=main" in words else None)

    def test_more_than_its_nodes_have_is_refused_and_nothing_is_written(self, run, asked, monkeypatch, capsys):
        def too_large(*args):
            raise ConfigurationError("cluster.mem_gib=900 is more than a node has")

        monkeypatch.setattr(submit, "require_fit", too_large)
        before = (run / "config.yaml").read_text()
        assert run_command("resume", [str(run), "cluster.mem_gib=900"]) == 1
        assert "cluster.mem_gib=900" in capsys.readouterr().err
        assert (run / "config.yaml").read_text() == before
        assert not asked

    @pytest.mark.parametrize("damage", [{"job_ids": ["x"]}, {"cpus": ["2"]}, {"mem_mb": "2000"}])
    def test_a_request_that_is_damaged_is_named(self, damage, run, asked, monkeypatch, capsys):
        monkeypatch.setattr(
            resume, "job_states", lambda ids: pytest.fail(f"asked about {list(ids)}") if "x" in ids else {}
        )
        (run / "job.json").write_text(json.dumps({**json.loads((run / "job.json").read_text()), **damage}))
        assert run_command("resume", [str(run)]) == 1
        said = capsys.readouterr().err
        assert "job.json is damaged" in said
        assert next(iter(damage)) in said
        assert not asked

    def test_of_a_run_of_this_machine_they_are_refused(self, run, asked, monkeypatch, capsys):
        monkeypatch.setattr(submit, "slurm_available", lambda: False)
        before = (run / "config.yaml").read_text()
        assert run_command("resume", [str(run), "cluster.mem_gib=8"]) == 1
        said = capsys.readouterr().err
        assert "cluster.mem_gib=8" in said
        assert "this machine" in said
        assert (run / "config.yaml").read_text() == before


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
        assert resume.reason_not_to_resume(run, None, failed=False) is None
