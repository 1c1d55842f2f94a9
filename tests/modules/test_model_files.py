"""World models as files: what is saved comes back, and what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import WorldModelSpec, make_world_model, read_world_model, save_world_model, world_model_facts

SPEC = {"num_tasks": 2, "task_dim": 4, "action_dims": (1, 2), "reward_head": "two_hot", "reward_space": "symlog"}


@pytest.fixture
def saved(tmp_path):
    spec = WorldModelSpec(8, 2, 16, [32], [32], dynamics={"kind": "flow", "solver": "heun", "substeps": 2}, **SPEC)
    model = make_world_model(spec)
    facts = save_world_model(
        tmp_path / "model", model, spec, task_names=("a", "b"), observation_dims=(3, 8), labels={"epoch": 7}
    )
    return tmp_path / "model", model, facts


def test_comes_back(saved):
    folder, model, written = saved
    again, facts = read_world_model(folder, written.sha256)
    assert facts.task_names == ("a", "b")
    assert facts.observation_dims == (3, 8)
    assert facts.labels == {"epoch": 7}
    assert facts.sha256 == written.sha256
    observation, task = torch.randn(4, 8), torch.tensor([0, 1, 1, 0])
    assert torch.equal(again.encode(observation, task), model.encode(observation, task))
    assert again.reward.space == "symlog"
    assert read_world_model(folder, reward_space="raw")[0].reward.space == "raw"


def test_is_found_in_a_run_directory(saved, tmp_path):
    folder, _, written = saved
    folder.rename(tmp_path / "world_model")
    assert world_model_facts(tmp_path).sha256 == written.sha256


def test_a_second_one_replaces_the_first(saved):
    folder, model, written = saved
    with torch.no_grad():
        model.reward.net[-1].weight.add_(1)
    second = save_world_model(folder, model, written.spec)
    assert second.sha256 != written.sha256
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(ConfigurationError, match="not the one that the run began with"):
        read_world_model(folder, written.sha256)


def test_a_writer_that_dies_leaves_the_old_one(saved, monkeypatch):
    from pwm_torchrl.modules import model_files

    folder, model, written = saved
    with torch.no_grad():
        model.reward.net[-1].weight.add_(1)
    replace = model_files._replace

    def dies(path, content):
        if path.name == model_files.CONFIG_FILE:
            raise OSError("dead")
        replace(path, content)

    monkeypatch.setattr(model_files, "_replace", dies)
    with pytest.raises(OSError, match="dead"):
        save_world_model(folder, model, written.spec)
    assert read_world_model(folder)[1].sha256 == written.sha256


def edit(folder, **changes):
    file = folder / "world_model.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(content))


class TestDamage:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(ConfigurationError, match="does not exist"):
            world_model_facts(tmp_path / "none")
        with pytest.raises(ConfigurationError, match="holds no world model"):
            world_model_facts(tmp_path)
        with pytest.raises(ConfigurationError, match=r"world_model\.py import"):
            world_model_facts(tmp_path / "mt30.pt")

    def test_flipped_bits(self, saved):
        folder, _, _ = saved
        (weights,) = folder.glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(ConfigurationError, match="damaged"):
            read_world_model(folder)

    def test_no_weights(self, saved):
        folder, _, _ = saved
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_world_model(folder)

    def test_another_architecture(self, saved):
        folder, _, facts = saved
        edit(folder, spec={**vars(facts.spec), "units": [16]})
        with pytest.raises(ConfigurationError, match="do not fit"):
            read_world_model(folder)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"version": 2}, "newer"),
            ({"format": "other"}, "does not describe"),
        ],
    )
    def test_another_format(self, saved, changes, match):
        folder, _, _ = saved
        edit(folder, **changes)
        with pytest.raises(ConfigurationError, match=match):
            world_model_facts(folder)

    def test_a_key_of_a_later_version(self, saved):
        folder, _, facts = saved
        edit(folder, spec={**vars(facts.spec), "quantum": True})
        with pytest.raises(ConfigurationError, match="quantum that this version"):
            world_model_facts(folder)
        (folder / "world_model.json").write_text("{")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            world_model_facts(folder)


def test_a_key_that_an_older_version_lacked_has_its_default(saved):
    folder, _, facts = saved
    spec = {key: value for key, value in vars(facts.spec).items() if key != "normalize_observations"}
    edit(folder, spec=spec)
    assert world_model_facts(folder).spec.normalize_observations is False
