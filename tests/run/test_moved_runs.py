"""A run directory and everything that belongs to it can be moved."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from stored_cases import write_store
from test_extraction import extraction_config, make_two_task_model
from training_cases import assert_equal, run_with, stop_after

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import read_world_model
from pwm_torchrl.run.directory import keys_preventing_resume, save_config
from pwm_torchrl.run.load import load_networks
from pwm_torchrl.training import train


@pytest.fixture
def project(tmp_path):
    """A world model, a store and the folder of an extraction, side by side."""
    folder = tmp_path / "project"
    write_store(folder / "data" / "store")
    make_two_task_model(folder / "models" / "world_model")
    return folder


def test_a_moved_extraction_finds_its_world_model_by_its_hash(project, tmp_path, monkeypatch):
    cfg = extraction_config(project / "data" / "store", project / "models" / "world_model", {"training.epochs": 1})
    run_with(monkeypatch, cfg, project / "runs_of_it")
    save_config(cfg, project / "runs_of_it")
    observation = torch.randn(5, 8)
    before = load_networks(project / "runs_of_it", "last")[1].model.encode(observation)
    shutil.move(project, tmp_path / "moved")
    after = load_networks(tmp_path / "moved" / "runs_of_it", "last")[1].model.encode(observation)
    assert torch.equal(before, after)


def test_another_world_model_of_that_place_is_not_taken(project, tmp_path, monkeypatch):
    cfg = extraction_config(project / "data" / "store", project / "models" / "world_model", {"training.epochs": 1})
    run_with(monkeypatch, cfg, project / "run")
    save_config(cfg, project / "run")
    shutil.rmtree(project / "models")
    make_two_task_model(project / "models" / "world_model", seed=1)
    with pytest.raises(ConfigurationError, match="is not the one that the run began with"):
        load_networks(project / "run", "last")


def test_it_goes_on_where_its_store_and_world_model_are_now(project, tmp_path, monkeypatch):
    changes = {"training.epochs": 4, "training.eval_every": 0}
    place = project / "data" / "store", project / "models" / "world_model"
    _, straight = run_with(monkeypatch, extraction_config(*place, changes), project / "straight")
    run_with(monkeypatch, extraction_config(*place, changes), project / "run", after_epoch=stop_after(2))
    shutil.move(project, tmp_path / "moved")
    there = tmp_path / "moved"
    cfg = extraction_config(there / "data" / "store", there / "models" / "world_model", changes)
    before = copy.deepcopy(cfg)
    before.data.path, before.world_model = map(str, place)
    assert keys_preventing_resume(before, cfg) == {}
    summary, resumed = run_with(monkeypatch, cfg, there / "run", resume=True)
    assert (summary["status"], summary["epochs_done"]) == ("finished", 4)
    for name in ("actor", "critic"):
        ours, theirs = (dict(run.networks.items())[name].state_dict() for run in (resumed, straight))
        assert_equal(ours, theirs)


def test_other_episodes_are_not_taken_for_those_of_the_run(project, monkeypatch):
    place = project / "data" / "store", project / "models" / "world_model"
    run_with(monkeypatch, extraction_config(*place), project / "run", after_epoch=stop_after(2))
    other = write_store(project / "data" / "other", seed=1)
    with pytest.raises(ConfigurationError, match=r"data\.path=.*other does not hold the episodes"):
        train(extraction_config(other, place[1]), project / "run", resume=True)


def test_another_world_model_is_another_run(project):
    place = project / "data" / "store", project / "models" / "world_model"
    make_two_task_model(project / "models" / "second", seed=1)
    first, second = extraction_config(*place), extraction_config(place[0], project / "models" / "second")
    assert set(keys_preventing_resume(first, second)) == {"world_model_sha256"}
    assert first.world_model_sha256 == read_world_model(place[1])[1].sha256
