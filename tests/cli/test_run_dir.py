"""A run's directory: fresh, resumed or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config, prepare_run_dir, read_summary, save_config

pytestmark = pytest.mark.usefixtures("workdir")


def refusal(*words: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        prepare_run_dir(compose(list(words)))
    return str(caught.value)


def start(path: str, *words: str, status: str = "running") -> None:
    """What a run leaves behind after its first epoch."""
    run = prepare_run_dir(compose([f"run_dir={path}", *words]))
    (run.path / "summary.json").write_text(json.dumps({"status": status}))


def test_the_default_is_unique_and_says_what_it_is():
    runs = [prepare_run_dir(compose(["model=mlp", "seed=3"])) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        assert run.path.parent == Path("runs").absolute()
        assert run.path.name.startswith("pendulum_mlp_tiny_s3_20")
        assert not run.resume


def test_names_are_safe_for_file_systems():
    config = compose(["env=gymnasium", "env.id=My/Env-v0"])
    assert prepare_run_dir(config).path.name.startswith("My-Env-v0_residual")


def test_configuration_survives_the_round_trip():
    config = compose(["env._target_=a.b", "env.x={y: [1, 2.5]}", "algorithm.model_lr=1e-5", "run_dir=run"])
    path = prepare_run_dir(config).path
    assert load_config(path) == dataclasses.replace(config, run_dir=None)


def test_missing_or_empty_is_fresh():
    Path("empty").mkdir()
    assert not prepare_run_dir(compose(["run_dir=empty"])).resume
    assert not prepare_run_dir(compose(["run_dir=deep/er/missing"])).resume
    assert Path("deep/er/missing/config.yaml").is_file()


def test_same_configuration_resumes():
    start("run", "model=mlp")
    assert prepare_run_dir(compose(["run_dir=run", "model=mlp"])).resume
    assert prepare_run_dir(compose(["run_dir=../work/run", "model=mlp"])).resume


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_failed_and_stopped_runs_resume(status):
    start("run", status=status)
    assert prepare_run_dir(compose(["run_dir=run"])).resume


def test_created_but_never_started_is_fresh():
    prepare_run_dir(compose(["run_dir=run"]))
    assert not prepare_run_dir(compose(["run_dir=run"])).resume


def test_keys_that_change_no_result_may_differ():
    start("run", "model=flow_v2")
    words = ["model=flow_v2", "cluster=debug", "training.progress=false", "logger=tensorboard"]
    words += ["memory.model_micro_batch=64"]
    words += ["training.replay_storage=disk", "model.dynamics.checkpoint_substeps=true"]
    assert prepare_run_dir(compose(["run_dir=run", *words])).resume
    assert load_config("run").memory.model_micro_batch == 64


def test_a_length_in_steps_is_its_length_in_epochs():
    start("run", "training.steps=1e4")
    assert load_config("run").training.steps == 10_000
    assert prepare_run_dir(compose(["run_dir=run", "training.epochs=79"])).resume
    assert prepare_run_dir(compose(["run_dir=run", "training.steps=10_001"])).resume
    assert "training.epochs: 79 there, 78 requested" in refusal("run_dir=run", "training.steps=9_900")


def test_another_configuration_is_refused_with_its_keys():
    start("run", "model=mlp")
    before = Path("run/config.yaml").read_text()
    message = refusal("run_dir=run", "algorithm.horizon=8", "env.num_envs=4", "model=mlp")
    assert "algorithm.horizon: 3 there, 8 requested" in message
    assert "env.num_envs: 8 there, 4 requested" in message
    assert len(message.splitlines()) == 3
    assert Path("run/config.yaml").read_text() == before


def test_finished_is_refused():
    start("run", "training.epochs=5", status="finished")
    for epochs in (4, 5):
        message = refusal("run_dir=run", f"training.epochs={epochs}")
        assert "finished run of training.epochs=5" in message
    assert load_config("run").training.epochs == 5


@pytest.mark.parametrize("status", ["stopped", "finished"])
def test_a_run_may_become_longer(status):
    start("run", "training.epochs=5", status=status)
    assert prepare_run_dir(compose(["run_dir=run", "training.epochs=8"])).resume
    assert load_config("run").training.epochs == 8
    assert read_summary("run")["status"] == "stopped"  # for resume.py, should its job never begin
    assert "algorithm.horizon: 3 there, 8 requested" in refusal(
        "run_dir=run", "training.epochs=9", "algorithm.horizon=8"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"- a list\n", "cut short"),
        (b"word", "config.yaml"),
        (b"\xff\xfe\x00", "config.yaml"),
        (b"mode: online\nmode: online\n", "config.yaml"),
    ],
)
def test_a_damaged_configuration_file_is_one_sentence(content, said):
    start("run")
    Path("run/config.yaml").write_bytes(content)
    message = refusal("run_dir=run")
    assert said in message
    assert "config.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("line", "key"), [("seed: 0", "seed"), ("  horizon: 3", "algorithm.horizon"), ("  num_envs: 8", "env.num_envs")]
)
def test_a_value_that_is_left_open_in_it_is_not_the_default(line, key):
    start("run")
    file = Path("run/config.yaml")
    before = file.read_text()
    assert before.count(f"\n{line}\n") == 1
    file.write_text(before.replace(f"\n{line}\n", f"\n{line.partition(':')[0]}: ???\n"))
    with pytest.raises(ConfigurationError) as caught:
        load_config("run")
    assert str(caught.value) == f"run/config.yaml: {key} has no value; restore the run's value"


def test_a_configuration_file_that_was_cut_short_is_not_taken_for_another_run():
    """Every key behind the cut would have its default."""
    start("run", "training.epochs=5")
    text = Path("run/config.yaml").read_text()
    for lines in range(1, len(text.splitlines())):
        Path("run/config.yaml").write_text("".join(text.splitlines(True)[:lines]))
        with pytest.raises(ConfigurationError, match=r"config\.yaml"):
            load_config("run")


def test_something_else_is_refused():
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    assert "neither empty nor a run directory" in refusal("run_dir=thesis")
    assert [p.name for p in Path("thesis").iterdir()] == ["chapter.tex"]
    assert "is a file" in refusal("run_dir=thesis/chapter.tex")


@pytest.mark.parametrize("key", ["run_dir", "runs_dir"])
def test_unwritable_is_one_sentence(key):
    Path("file").touch()
    message = refusal(f"{key}=file/below")
    assert key in message
    assert "\n" not in message
    assert f"{key}=/proc" in refusal(f"{key}=/proc/none")


@pytest.mark.parametrize("content", ["model: [", "model: {knid: 1}", "seed: many"])
def test_a_broken_configuration_file_is_one_sentence(content):
    start("run")
    Path("run/config.yaml").write_text(content)
    message = refusal("run_dir=run")
    assert "config.yaml" in message
    assert "\n" not in message


def test_not_a_run():
    with pytest.raises(ConfigurationError, match="is not a run directory"):
        load_config("nowhere")


def test_save_replaces_whole_files():
    Path("run").mkdir()
    save_config(compose(), Path("run"))
    assert [p.name for p in Path("run").iterdir()] == ["config.yaml"]
