"""Loggers: what is made, what W&B and TensorBoard get, where they fall back, and that they never end a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pwm_torchrl.config import Config, LoggerConfig, ModelConfig, SizeConfig
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run import loggers
from pwm_torchrl.run.artifacts import write_video
from pwm_torchrl.run.loggers import RunLoggers, RunWandbLogger, group_name, make_loggers, require_logging

SWEEP = Path(__file__).parents[2] / "examples" / "wandb_sweep.yaml"
FACTS = {"git_commit": "0" * 40, "versions": {"torch": "2"}}


def config(seed: int = 0, **logger) -> Config:
    env = {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "name": "pendulum"}
    names = {"model": ModelConfig(name="mlp"), "size": SizeConfig(name="tiny")}
    return Config(env=env, seed=seed, logger=LoggerConfig(**logger), **names)


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """No key, no home with one, and a server address on this machine where nobody listens."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def video(folder: Path) -> Path:
    pytest.importorskip("imageio_ffmpeg")
    frames = (np.full((48, 64, 3), i, np.uint8) for i in range(250))
    return write_video(folder / "video.mp4", frames, fps=50)


def test_csv_needs_no_logger(tmp_path):
    for cfg in (config(), config(also=["csv"]), config(kind="wandb", mode="disabled")):
        made = make_loggers(cfg, tmp_path, FACTS)
        assert len(made) == 0
        made.log_metrics({"x": 1.0}, step=0)
        made.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("logger", "told"),
    [({"kind": "tb"}, ["logger.kind", "tb"]), ({"also": ["wb"]}, ["logger.also", "wb"]),
     ({"kind": "wandb", "mode": "on"}, ["logger.mode", "on"])],
)  # fmt: skip
def test_unknown_choices_are_named(tmp_path, logger, told):
    for check in (lambda cfg: make_loggers(cfg, tmp_path, FACTS), lambda cfg: require_logging(cfg.logger)):
        with pytest.raises(ConfigurationError) as error:
            check(config(**logger))
        assert all(word in str(error.value) for word in told)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=rf"pwm-torchrl\[{kind}\]"):
        make_loggers(config(also=[kind]), tmp_path, FACTS)


def test_a_group_is_of_runs_that_differ_in_the_seed_only():
    groups = {group_name(config(seed)) for seed in range(3)}
    assert len(groups) == 1
    assert groups == {group_name(config(7, kind="wandb", notes="elsewhere"))}
    assert groups.isdisjoint({group_name(dataclasses.replace(config(), mode="extract"))})
    assert groups.pop().startswith("pendulum_mlp_tiny_")


class TestTensorboard:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("tensorboard")

    def read(self, run_dir):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        return events

    def scalars(self, run_dir):
        return [(event.step, event.value) for event in self.read(run_dir).Scalars("loss/model")]

    def test_writes_into_the_run_directory_and_resumes(self, tmp_path):
        made = make_loggers(config(kind="tensorboard"), tmp_path, FACTS)
        for step in range(5):
            made.log_metrics({"loss/model": float(step)}, step=step)
        made.close()
        assert self.scalars(tmp_path) == [(step, float(step)) for step in range(5)]

        # A process died after step 4; its checkpoint was of step 2.
        made = make_loggers(config(kind="tensorboard"), tmp_path, FACTS, first_step=3)
        made.log_metrics({"loss/model": 30.0}, step=3)
        made.close()
        assert self.scalars(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]

    def test_a_video_is_an_animation(self, tmp_path):
        image = pytest.importorskip("PIL.Image")
        import io

        made = make_loggers(config(kind="tensorboard"), tmp_path, FACTS)
        made.log_video_file("video", video(tmp_path), step=7)
        made.close()
        (event,) = self.read(tmp_path).Images("video")
        assert (event.step, event.height, event.width) == (7, 48, 64)
        animation = image.open(io.BytesIO(event.encoded_image_string))
        assert animation.format == "GIF"
        # 250 frames of 20 ms are 120 of 42 ms.
        assert animation.n_frames == loggers.GIF_FRAMES
        assert animation.info["duration"] == pytest.approx(42, abs=10)


def records(run_dir: Path) -> list:
    """What an offline run of W&B holds: protocol buffers in a log of LevelDB's format, after a header of 7 bytes.

    A block of 32 KiB holds parts of records: checksum (4 bytes), length (2), kind (1 whole, 2 first, 3 middle, 4 last).
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes the last lines when it ends
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


@pytest.mark.usefixtures("no_wandb_account")
class TestWandb:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("wandb")

    def test_what_an_offline_run_holds(self, tmp_path):
        cfg = config(kind="wandb", mode="offline", tags=["paper", "ablation"], notes="why", project="mine")
        made = make_loggers(cfg, tmp_path, FACTS)
        assert made.wandb_url is None
        made.log_metrics({"epoch": 1, "loss/model": 0.5}, step=128)
        made.log_video_file("video", video(tmp_path), step=128)
        (tmp_path / "actor.safetensors").write_bytes(b"weights")
        made.log_artifact("policy-x", "policy", [tmp_path / "actor.safetensors"], {"epoch": 3})
        made.summarize({"peak_return": -150.0})
        made.close(failed=True)

        found = records(tmp_path)
        (run,) = [record.run for record in found if record.HasField("run")]
        assert (run.project, run.job_type, run.notes) == ("mine", "online", "why")
        assert set(run.tags) == {"paper", "ablation"}
        assert run.run_group == group_name(cfg)
        shown = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert shown["model"]["name"] == "mlp"
        assert {key: shown[key] for key in FACTS} == FACTS
        history = [
            {i.key or "/".join(i.nested_key): i.value_json for i in r.history.item}
            for r in found
            if r.HasField("history")
        ]
        assert any(json.loads(row.get("loss/model", "0")) == 0.5 for row in history)
        assert any(row.get("video/_type") == '"video-file"' for row in history)
        (artifact,) = [record.artifact for record in found if record.HasField("artifact")]
        assert artifact.name == "policy-x"
        assert json.loads(artifact.metadata) == {"epoch": 3}
        (entry,) = artifact.manifest.contents
        # Uploaded later from where it is, without a copy in the home directory.
        assert (entry.path, entry.local_path) == ("actor.safetensors", str(tmp_path / "actor.safetensors"))
        (exit_code,) = [record.exit.exit_code for record in found if record.HasField("exit")]
        assert exit_code == 1

    def test_auto_without_a_key_logs_offline_and_says_so(self, tmp_path, caplog):
        before = dict(os.environ)
        made = make_loggers(config(kind="wandb"), tmp_path, FACTS)
        try:
            logger = made.wandb
            assert logger is not None
            assert logger.offline
            assert "offline" in caplog.text
            # Later processes of this one must not inherit the mode.
            assert os.environ.get("WANDB_MODE") == before.get("WANDB_MODE")
            run_id = logger.experiment.id
            assert (tmp_path / "wandb_id.txt").read_text().strip() == run_id
        finally:
            made.close()
        assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
        # A resumed run continues under the same id.
        assert loggers._stable_id(tmp_path) == run_id

    def test_several_loggers_get_the_same(self, tmp_path):
        pytest.importorskip("tensorboard")
        made = make_loggers(config(kind="wandb", also=["tensorboard", "csv"], mode="offline"), tmp_path, FACTS)
        assert [type(each).__name__ for each in made.loggers] == ["RunWandbLogger", "RunTensorboardLogger"]
        made.log_metrics({"loss/model": 0.5}, step=3)
        made.close()
        assert TestTensorboard().scalars(tmp_path) == [(3, 0.5)]
        assert any(record.HasField("history") for record in records(tmp_path))

    def test_a_damaged_id_is_told(self, tmp_path, capsys):
        file = tmp_path / "wandb_id.txt"
        file.write_bytes(b"ab\xffcd\n")
        made = loggers._stable_id(tmp_path)
        assert str(file) in capsys.readouterr().err
        assert made == file.read_text().strip() == loggers._stable_id(tmp_path)

    def test_an_agent_of_a_sweep_names_its_run(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_RUN_ID", "given123")
        assert loggers._stable_id(tmp_path / "..") != "given123"
        (tmp_path / ".." / "wandb_id.txt").unlink()
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
        assert loggers._stable_id(tmp_path) == "given123"

    def test_auto_without_network_logs_offline(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert "127.0.0.1" in (loggers.offline_reason() or "")

    def test_a_proxy_is_what_must_be_reached(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid")
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert loggers.offline_reason() is None
        assert "wandb.invalid" in (loggers.offline_reason() or "")

    def test_a_key_in_netrc_counts(self, monkeypatch, tmp_path):
        file = tmp_path / "netrc"
        file.write_text("machine 127.0.0.1 login user password " + "0" * 40 + "\n")
        file.chmod(0o600)
        monkeypatch.setenv("NETRC", str(file))
        assert loggers.has_wandb_key()

    def test_online_without_a_server_falls_back_and_logs(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(loggers, "INIT_TIMEOUT", 1.0)
        made = make_loggers(config(kind="wandb", mode="online"), tmp_path, FACTS)
        assert made.wandb is not None
        assert made.wandb.offline
        assert made.wandb_url is None
        assert "wandb sync" in caplog.text
        made.log_metrics({"loss/model": 0.5}, step=0)
        made.close()
        assert list((tmp_path / "wandb").glob("offline-run-*"))

    def test_start_that_always_fails_leaves_metrics_csv(self, tmp_path, monkeypatch, caplog):
        started = []

        def start(cfg, run_dir, shown, mode):
            started.append(mode)
            raise TimeoutError("no answer\nand a long explanation")

        monkeypatch.setattr(loggers, "_start_wandb", start)
        assert len(make_loggers(config(kind="wandb", mode="online"), tmp_path, FACTS)) == 0
        assert started == ["online", "offline"]
        assert caplog.text.count("no answer") == 2
        assert "long explanation" not in caplog.text

    def test_leaves_the_seeded_generators_alone(self, tmp_path):
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        make_loggers(config(kind="wandb", mode="offline"), tmp_path, FACTS).close()
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_the_url_of_an_online_run():
    logger = object.__new__(RunWandbLogger)
    logger.offline = False
    logger.experiment = type("Experiment", (), {"url": "https://wandb.ai/me/mine/runs/1"})()
    assert RunLoggers([logger]).wandb_url == "https://wandb.ai/me/mine/runs/1"


def test_a_sweeps_agent_starts_a_run_of_this_package(monkeypatch):
    """The command line that W&B's own agent makes of the file composes, for values from everywhere in its ranges."""
    pytest.importorskip("hydra")
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    from pwm_torchrl.cli.compose import compose

    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    assert (SWEEP.parents[1] / sweep["program"]).is_file()
    assert sweep["metric"]["name"] == "eval/return_mean"
    for end in (0, -1):
        values = {
            key: (p["values"][end] if "values" in p else p[("min", "max")[end]])
            for key, p in sweep["parameters"].items()
        }
        args = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
        places = {"${env}": ["env"], "${interpreter}": ["python"], "${program}": [sweep["program"]],
                  "${args_no_hyphens}": args["args_no_hyphens"]}  # fmt: skip
        command = [
            word for part in utils.create_sweep_command(list(sweep["command"])) for word in places.get(part, [part])
        ]
        assert command[:3] == ["env", "python", "launch/train.py"]
        cfg = compose(command[3:])
        assert (cfg.logger.kind, cfg.model.name, cfg.seed) == ("wandb", values["model"], values["seed"])
        assert cfg.algorithm.actor_lr == values["algorithm.actor_lr"]
        assert cfg.algorithm.horizon == values["algorithm.horizon"]


class Recorder(loggers.Logger):
    """Keeps what it gets, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(exp_name="recorder", log_dir="")
        self.error, self.got = error, []

    def _create_experiment(self): ...
    def log_scalar(self, name, value, step=None):
        self.got.append((name, value, step))
        if self.error is not None:
            raise self.error

    def log_video(self, name, video, step=None, **kwargs): ...
    def log_hparams(self, cfg): ...
    def log_histogram(self, name, data, **kwargs): ...
    def __repr__(self):
        return "Recorder()"


def test_a_logger_that_breaks_is_left_out_and_the_others_go_on(caplog):
    broken, whole = Recorder(BrokenPipeError("service gone")), Recorder()
    both = RunLoggers([broken, whole])
    for step in range(3):
        both.log_metrics({"x": 1.0}, step=step)
    assert len(broken.got) == 1
    assert whole.got == [("x", 1.0, step) for step in range(3)]
    assert caplog.text.count("service gone") == 1


class TestClosing:
    def test_does_not_wait_for_ever(self, caplog):
        release = threading.Event()
        slow = Recorder()
        slow.shutdown = release.wait
        RunLoggers([slow]).close(timeout=0.05)
        assert "Recorder" in caplog.text
        release.set()

    def test_does_not_raise(self, caplog):
        failing = Recorder()

        def shutdown():
            raise RuntimeError("no")

        failing.shutdown = shutdown
        RunLoggers([failing]).close()
        assert "no" in caplog.text


class TestProvenance:
    def git(self, folder, *words):
        identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        command = ["git", *words]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **identity}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def test_the_commit_of_a_checkout(self, tmp_path):
        from pwm_torchrl.run.directory import COMMIT_FILE, git_commit

        assert git_commit(tmp_path) is None
        self.git(tmp_path, "init", "-q")
        assert git_commit(tmp_path) is None
        (tmp_path / "a.py").write_text("1")
        self.git(tmp_path, "add", "a.py")
        self.git(tmp_path, "commit", "-qm", "first")
        commit = self.git(tmp_path, "rev-parse", "HEAD")
        assert git_commit(tmp_path) == commit
        (tmp_path / "new.py").write_text("untracked files are data or results")
        assert git_commit(tmp_path) == commit
        (tmp_path / "a.py").write_text("2")
        assert git_commit(tmp_path) == f"{commit}-dirty"
        copy = tmp_path / "copy"
        copy.mkdir()
        assert git_commit(copy) is None
        (copy / COMMIT_FILE).write_text(commit + "\n")
        assert git_commit(copy) == commit


class TestVariablesOfWandb:
    """What is not said in the configuration, W&B's own variables say."""

    @pytest.mark.parametrize(
        ("variables", "mode", "expected"),
        [
            ({}, "auto", "auto"),
            ({"WANDB_MODE": "disabled"}, "auto", "disabled"),
            ({"WANDB_MODE": "offline"}, "auto", "offline"),
            ({"WANDB_MODE": "dryrun"}, "auto", "offline"),
            ({"WANDB_MODE": "online"}, "auto", "online"),
            ({"WANDB_DISABLED": "true"}, "auto", "disabled"),
            ({"WANDB_DISABLED": "false"}, "auto", "auto"),
            ({"WANDB_MODE": "disabled"}, "online", "online"),
            ({"WANDB_DISABLED": "true"}, "offline", "offline"),
        ],
    )
    def test_mode(self, variables, mode, expected, monkeypatch):
        for name in ("WANDB_MODE", "WANDB_DISABLED"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert loggers.wandb_mode(LoggerConfig(kind="wandb", mode=mode)) == expected

    @pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
    def test_disabled_makes_no_logger(self, name, value, tmp_path, monkeypatch):
        monkeypatch.setenv(name, value)
        assert len(make_loggers(config(kind="wandb"), tmp_path, FACTS)) == 0
        assert not list(tmp_path.iterdir())

    def test_online_without_a_key_is_refused_by_its_name(self, monkeypatch, no_wandb_account):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "online")
        with pytest.raises(ConfigurationError, match=r"WANDB_MODE=online needs a W&B key"):
            require_logging(LoggerConfig(kind="wandb"))

    @pytest.mark.parametrize("project", [None, "typed"])
    def test_names(self, project, tmp_path, monkeypatch, no_wandb_account):
        pytest.importorskip("wandb")
        said = {"PROJECT": "theirs", "NAME": "my name", "RUN_GROUP": "group", "JOB_TYPE": "sweep", "TAGS": "a,b"}
        for name, value in said.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        loggers._teardown()  # W&B reads its variables once in the life of its service
        made = make_loggers(config(kind="wandb", project=project), tmp_path, FACTS)
        try:
            run = made.wandb.experiment
            assert (run.project, run.name, run.group) == (project or "theirs", "my name", "group")
            assert (run.job_type, list(run.tags)) == ("sweep", ["a", "b"])
        finally:
            made.close()
