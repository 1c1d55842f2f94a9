"""A run exported, given to W&B and pushed to a hub, and loaded from there."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_stand_in import running_hub
from training_cases import config, run_with

from pwm_torchrl import load_env, load_policy, load_world_model
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.run.export import EXPORT_FILE, foreign_names, read_export
from pwm_torchrl.run.load import load_networks
from pwm_torchrl.run.publish import export_run, log_artifacts, push_run

pytest.importorskip("safetensors")

NAME = "my-team/pendulum"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run; the learning rate makes its epochs differ."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    run_dir.mkdir()
    cfg = config({"algorithm.actor_lr": 0.05, "training.epochs": 3, "algorithm.normalize_observations": True})
    save_config(cfg, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        run_with(patch, cfg, run_dir)
    (run_dir / "summary.json").write_text(json.dumps({
        "env": "pendulum", "status": "finished", "final_return": -151.25, "final_return_std": 80.0,
        "random_return": -1200.0, "env_steps": 12800, "git_commit": "0" * 40, "versions": {"torch": "2.13"},
    }))  # fmt: skip
    return run_dir


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, to which huggingface_hub is told to talk, with a token and a cache of its own."""
    pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield server


def actions(policy):
    return policy(torch.linspace(-1, 1, 15).reshape(5, 3))


class TestExport:
    def test_the_networks_are_those_of_the_checkpoint(self, trained, tmp_path):
        files = export_run(trained, tmp_path / "out", "last")
        assert {file.name for file in files} == {
            "config.yaml", "summary.json", EXPORT_FILE, "model.safetensors", "actor.safetensors", "critic.safetensors",
        }  # fmt: skip
        exported, original = load_networks(tmp_path / "out")[1], load_networks(trained, "last")[1]
        for (name, ours), (other, theirs) in zip(exported.items(), original.items(), strict=True):
            assert name == other
            for key, tensor in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[key], tensor), f"{name}.{key}"
        assert torch.equal(actions(load_policy(tmp_path / "out")), actions(load_policy(trained, "last")))
        assert torch.equal(actions(load_policy(tmp_path / "out")), actions(load_policy(str(tmp_path / "out"))))

    def test_nothing_in_it_is_code_or_pickle(self, trained, tmp_path):
        export_run(trained, tmp_path)
        assert {file.suffix for file in tmp_path.iterdir()} == {".yaml", ".json", ".safetensors"}

    @pytest.mark.parametrize("damage", ["version", "file", "weights", "json"])
    def test_what_is_damaged_is_refused(self, trained, tmp_path, damage):
        export_run(trained, tmp_path)
        file = tmp_path / EXPORT_FILE
        if damage == "version":
            file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
        elif damage == "json":
            file.write_text("{")
        elif damage == "file":
            (tmp_path / "actor.safetensors").unlink()
        else:
            shutil.copy(tmp_path / "critic.safetensors", tmp_path / "actor.safetensors")
        told = {"version": "99", "json": EXPORT_FILE, "file": "actor.safetensors", "weights": "actor.safetensors"}
        with pytest.raises(ConfigurationError, match=told[damage]):
            read_export(tmp_path)

    def test_a_command_exports(self, trained, tmp_path, capsys):
        assert run_command("hub", ["export", str(trained), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / EXPORT_FILE).is_file()
        assert run_command("hub", ["export", str(trained), str(tmp_path / "out")]) == 2
        assert "not empty" in capsys.readouterr().err


class TestHub:
    def test_there_and_back(self, hub, trained, tmp_path, capsys):
        (trained / "curves.png").write_bytes(b"picture")
        assert run_command("hub", ["push", str(trained), NAME, "--checkpoint", "last", "--private"]) == 0
        assert f"{hub.address}/{NAME}/commit/" in capsys.readouterr().out
        (files,) = hub.repositories[NAME]
        assert hub.private == {NAME: True}
        assert {"README.md", "config.yaml", "metrics.csv", "curves.png", "actor.safetensors"} <= files.keys()
        policy = load_policy(f"hf://{NAME}")
        assert torch.equal(actions(policy), actions(load_policy(trained, "last")))
        assert load_world_model(f"hf://{NAME}") is not None
        env = load_env(f"hf://{NAME}", num_envs=2)
        assert env.rollout(3, policy)["action"].shape == (2, 3, 1)

    def test_a_revision(self, hub, trained):
        push_run(trained, NAME, 2)
        push_run(trained, NAME, "last", message="longer")
        hub.tags["v1"] = 0
        assert hub.messages[1] == "longer"
        first, last = load_policy(trained, 2), load_policy(trained, "last")
        assert not torch.equal(actions(first), actions(last))
        assert torch.equal(actions(load_policy(f"hf://{NAME}", revision="v1")), actions(first))
        assert torch.equal(actions(load_policy(f"hf://{NAME}")), actions(last))
        with pytest.raises(ConfigurationError, match="v9"):
            load_policy(f"hf://{NAME}", revision="v9")

    def test_the_model_card(self, hub, trained):
        push_run(trained, NAME, "last")
        card = hub.repositories[NAME][0]["README.md"].decode()
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == "pwm_torchrl"
        assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == -151.25
        body = card.split("---", 2)[2]
        for told in ("-151.2 ± 80.0", "-1200.0", "12,800", "epoch 3 of 3", "0" * 40, "torch 2.13", f'"hf://{NAME}"'):
            assert told in body, told
        assert "trust_remote_code" not in body

    def test_what_names_other_code_needs_trust(self, hub, trained):
        push_run(trained, NAME, "last")
        files = hub.repositories[NAME][0]
        files["config.yaml"] = files["config.yaml"].replace(b"id: Pendulum-v1", b"id: evil_module:Pendulum-v1")
        assert b"evil_module" in files["config.yaml"]
        for load in (load_policy, load_world_model, load_env):
            with pytest.raises(ConfigurationError, match="evil_module"):
                load(f"hf://{NAME}")
        assert load_policy(f"hf://{NAME}", trust_remote_code=True) is not None

    def test_what_is_not_there_or_no_run(self, hub, trained, tmp_path):
        with pytest.raises(ConfigurationError, match="hf://no/body"):
            load_policy("hf://no/body")
        with pytest.raises(ConfigurationError, match="hf://no"):
            load_policy("hf://no///")
        hub.repositories["a/b"] = [{"config.json": b"{}"}]
        with pytest.raises(ConfigurationError, match=EXPORT_FILE):
            load_policy("hf://a/b")
        with pytest.raises(ConfigurationError, match="revision=v1"):
            load_policy(trained, revision="v1")

    def test_without_a_token(self, hub, trained, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
        assert run_command("hub", ["push", str(trained), NAME]) == 2
        assert "HF_TOKEN" in capsys.readouterr().err
        assert run_command("hub", ["push", str(trained), "pendulum"]) == 2
        assert "ORG/NAME" in capsys.readouterr().err

    def test_without_the_library(self, trained, monkeypatch):
        monkeypatch.setitem(importlib.import_module("sys").modules, "huggingface_hub", None)
        with pytest.raises(MissingLibraryError, match=r"pwm-torchrl\[hub\]"):
            load_policy("hf://a/b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"env._target_": "pwm_torchrl.envs.make_dm_control_env"}, []),
        ({"env._target_": "os.system"}, ["env._target_=os.system"]),
        # What our modules import is not ours.
        ({"env._target_": "pwm_torchrl.envs.makers.importlib.import_module"},
         ["env._target_=pwm_torchrl.envs.makers.importlib.import_module"]),
        ({"env.wrappers": [{"_target_": "their.Wrapper"}]}, ["env.wrappers.0._target_=their.Wrapper"]),
        ({"env.id": "their_module:Env-v0"}, ["env.id=their_module:Env-v0"]),
        ({"model.dynamics.kind": "their.Dynamics"}, ["model.dynamics.kind=their.Dynamics"]),
        ({"algorithm.name": "shac"}, []),
        ({"algorithm.name": "their.Algorithm"}, ["algorithm.name=their.Algorithm"]),
        ({"env.module": "dflex.envs"}, []),
        ({"env.module": "their_simulator"}, ["env.module=their_simulator"]),
    ],
)  # fmt: skip
def test_code_of_others_in_a_configuration(changes, named):
    cfg = config()
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        if section == "env":
            cfg.env[leaf] = value
        elif section == "algorithm":
            setattr(cfg.algorithm, leaf, value)
        else:
            setattr(cfg.model.dynamics, leaf, value)
    assert list(foreign_names(cfg)) == named


def test_artifacts_are_folders_that_load(trained, tmp_path):
    """As W&B keeps them: a policy with everything, and the world model alone."""

    class Loggers:
        wandb = type("Logger", (), {"experiment": type("Experiment", (), {"id": "abc"})()})()

        def __init__(self):
            self.made = {}

        def log_artifact(self, name, kind, files, metadata):
            self.made[name] = (kind, metadata)
            for file in files:
                (tmp_path / name).mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / name / file.name)

    loggers = Loggers()
    log_artifacts(loggers, trained, {"env": "pendulum", "peak_return": None, "final_return": -151.25})
    assert {name: kind for name, (kind, _) in loggers.made.items()} == {
        "policy-abc": "policy", "world-model-abc": "world-model",
    }  # fmt: skip
    metadata = loggers.made["policy-abc"][1]
    assert metadata["final_return"] == -151.25
    assert torch.equal(actions(load_policy(tmp_path / "policy-abc")), actions(load_policy(trained)))
    assert {file.name for file in (tmp_path / "world-model-abc").iterdir()} == {
        "config.yaml", EXPORT_FILE, "model.safetensors",
    }  # fmt: skip
    assert not list(trained.rglob("*.tmp"))
