"""World models as files: what is saved comes back, damage is named; what is read of TD-MPC2's and PWM's."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import (
    SimNormVelocityFlow,
    WorldModel,
    WorldModelSpec,
    load_pwm_world_model,
    load_tdmpc2_world_model,
    make_world_model,
    read_world_model,
    save_world_model,
    world_model_facts,
)

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
        with pytest.raises(ConfigurationError, match="quantum, which this version"):
            world_model_facts(folder)
        (folder / "world_model.json").write_text("{")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            world_model_facts(folder)


def test_a_key_that_an_older_version_lacked_has_its_default(saved):
    folder, _, facts = saved
    spec = {key: value for key, value in vars(facts.spec).items() if key != "normalize_observations"}
    edit(folder, spec=spec)
    assert world_model_facts(folder).spec.normalize_observations is False


# Files of TD-MPC2 and PWM ---------------------------------------------------------------------------------------------


GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {
    "encoder.net": "_encoder",
    "dynamics.net": "_dynamics",
    "reward.net": "_reward",
    "termination.net": "_termination",
}


def randomized(spec: WorldModelSpec) -> WorldModel:
    model = make_world_model(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return model


def theirs(model: WorldModel, **names: str) -> dict[str, Tensor]:
    """A model's weights under PWM's names."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, other in {**NAMES, "task.embedding": "_task_emb", **names}.items():
            key = key.replace(ours, other)
        state[key] = value
    if model.task is not None:
        state["_action_masks"] = model.task.action_mask
    return state


def published(model: WorldModel) -> dict[str, dict[str, Tensor]]:
    state = {k.replace("_encoder.", "_encoder.state."): v for k, v in theirs(model).items()}
    other = ("_pi.0.weight", "_Qs.params.0.weight", "_target_Qs.params.0", "_detach_Qs_params.0.ln.bias", "log_std_min")
    return {"model": state | {name: torch.zeros(2) for name in other}}


SPECS = {
    "single": WorldModelSpec(5, 2, 16, (24, 20), (12,), reward_head="two_hot", num_bins=31),
    "multi": WorldModelSpec(
        5,
        3,
        16,
        (24,),
        (12, 14, 10),
        reward_head="two_hot",
        reward_space="symlog",
        num_tasks=3,
        task_dim=6,
        action_dims=(2, 3, 1),
    ),
    "scalar": WorldModelSpec(7, 1, 8, (8, 8, 8), (9, 9), termination=True),
}


@pytest.mark.parametrize("name", SPECS)
class TestRoundTrip:
    def test_tdmpc2_file(self, name: str, tmp_path: Path) -> None:
        model = randomized(SPECS[name])
        torch.save(published(model), tmp_path / "model.pt")
        loaded, report = load_tdmpc2_world_model(tmp_path / "model.pt")
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
        assert report.spec == SPECS[name], "the architecture follows from the shapes"
        assert report.missing == ()
        assert {n.split(".")[0] for n in report.skipped} == {
            "_pi",
            "_Qs",
            "_target_Qs",
            "_detach_Qs_params",
            "log_std_min",
        }
        masks = {"task.action_mask"} if model.task else set()
        assert set(report.mapped.values()) == model.state_dict().keys() | masks
        if model.task:
            assert torch.equal(loaded.task.action_mask, model.task.action_mask)

    def test_pwm_state_dict(self, name: str) -> None:
        model = randomized(SPECS[name])
        loaded, report = load_pwm_world_model(theirs(model))
        task = torch.tensor([0, 2]) if model.task else None
        z, a = torch.rand(2, SPECS[name].latent_dim), torch.rand(2, SPECS[name].action_dim)
        for ours, other in zip(loaded(z, a, task), model(z, a, task), strict=True):
            assert torch.equal(ours, other)
        assert report.skipped == ()


def test_velocity_field_of_the_fork() -> None:
    dynamics = {"kind": "flow", "parameterization": "simnorm_velocity", "solver": "euler", "substeps": 8}
    model = randomized(WorldModelSpec(5, 2, 16, (24,), (12,), dynamics=dynamics))
    state = {k.replace("_dynamics.", "_velocity."): v for k, v in theirs(model).items()}
    loaded, report = load_pwm_world_model(state, solver="euler", substeps=8)
    assert isinstance(loaded.dynamics, SimNormVelocityFlow)
    assert report.spec.action_dim == 2
    z, a = torch.rand(3, 16), torch.rand(3, 2)
    assert torch.equal(loaded.dynamics(z, a), model.dynamics(z, a))


def test_options_that_shapes_do_not_tell() -> None:
    state = theirs(randomized(SPECS["single"]))
    model, _ = load_pwm_world_model(state, simnorm_dim=4, vmin=-3, vmax=5, reward_space="symlog")
    assert (model.reward.codec.vmin, model.reward.codec.vmax, model.reward.space) == (-3, 5, "symlog")
    z = model.encode(torch.randn(2, 5))
    torch.testing.assert_close(z.unflatten(-1, (4, 4)).sum(-1), torch.ones(2, 4))


def test_action_dims_replace_missing_masks() -> None:
    state = theirs(randomized(SPECS["multi"]))
    del state["_action_masks"]
    with pytest.raises(ConfigurationError, match="has no _action_masks; give action_dims"):
        load_pwm_world_model(state)
    model, _ = load_pwm_world_model(state, action_dims=[3, 3, 2])
    assert model.task.action_mask.sum(-1).tolist() == [3, 3, 2]


def test_missing_parameters_are_reported() -> None:
    state = theirs(randomized(SPECS["single"]))
    del state["_dynamics.0.ln.weight"]
    with pytest.raises(ConfigurationError, match=r"lacks dynamics\.net\.0\.ln\.weight"):
        load_pwm_world_model(state)
    assert load_pwm_world_model(state, strict=False)[1].missing == ("dynamics.net.0.ln.weight",)


class TestRefusals:
    """One sentence each, with the path."""

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"none\.pt does not exist"):
            load_tdmpc2_world_model(tmp_path / "none.pt")

    @pytest.mark.parametrize("kept", [0, 10, 1000, -100])
    def test_truncated_file(self, kept: int, tmp_path: Path) -> None:
        path = tmp_path / "cut.pt"
        path.write_bytes((GOLDEN / "tdmpc2_single.pt").read_bytes()[:kept])
        with pytest.raises(ConfigurationError, match=r"cut\.pt cannot be read: it is truncated"):
            load_tdmpc2_world_model(path)

    def test_pickled_objects_are_not_executed(self, tmp_path: Path) -> None:
        torch.save({"model": Path("x")}, tmp_path / "objects.pt")
        with pytest.raises(ConfigurationError, match="holds more than tensors"):
            load_tdmpc2_world_model(tmp_path / "objects.pt")

    @pytest.mark.parametrize("content", [{}, {"model": torch.zeros(2)}, [1], torch.zeros(2)])
    def test_other_formats(self, content: object, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ConfigurationError, match=r"other\.pt is not in TD-MPC2's format"):
            load_tdmpc2_world_model(tmp_path / "other.pt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"_encoder.rgb.0.weight": torch.zeros(2)}, r"_encoder\.rgb\.0\.weight \(image encoders"),
            ({"surprise": torch.zeros(2)}, "entries that no .* has: surprise"),
            ({"_reward.0.weight": torch.zeros(24, 99)}, r"reward\.net\.0\.weight has shape \[24, 99\]"),
            ({"_dynamics.7.weight": torch.zeros(2, 2)}, "layers of its dynamics are missing"),
        ],
    )
    def test_other_architectures(self, change: dict, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            load_pwm_world_model(theirs(randomized(SPECS["single"])) | change)

    def test_empty_state_dict(self) -> None:
        with pytest.raises(ConfigurationError, match="layers of its encoder are missing"):
            load_pwm_world_model({})

    def test_latent_that_simnorm_does_not_divide(self) -> None:
        with pytest.raises(ConfigurationError, match="simnorm_dim=7"):
            load_pwm_world_model(theirs(randomized(SPECS["single"])), simnorm_dim=7)

    def test_masks_with_holes(self) -> None:
        state = theirs(randomized(SPECS["multi"]))
        state["_action_masks"] = torch.tensor([[1.0, 0, 1], [1, 1, 1], [1, 0, 0]])
        with pytest.raises(ConfigurationError, match="not rows of ones followed by zeros"):
            load_pwm_world_model(state)


def test_loading_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tdmpc2_world_model(GOLDEN / "tdmpc2_multitask.pt")


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of TD-MPC2's older layout: Linear and LayerNorm apart, at places with gaps."""
    found = {}
    for name, value in state.items():
        match = re.fullmatch(r"(_encoder\.state|_dynamics|_reward)\.(\d+)\.(ln\.)?(weight|bias)", name)
        if match is None:
            found[name] = value
        elif match[1] == "_encoder.state":  # one flat Sequential: 1 Linear, 2 LayerNorm, 3 Mish, 4 Linear, ...
            found[f"{match[1]}.{1 + 3 * int(match[2]) + bool(match[3])}.{match[4]}"] = value
        else:
            found[f"{match[1]}.{match[2]}.{int(bool(match[3]))}.{match[4]}"] = value
    return found


class TestLayouts:
    @pytest.mark.parametrize("kind", ["single", "multi"])
    def test_the_older_one_gives_the_same_model(self, kind, tmp_path):
        expected = randomized(SPECS[kind])
        content = published(expected)
        content["model"] = older(content["model"])
        assert {"_encoder.state.1.weight", "_encoder.state.2.weight", "_dynamics.0.0.weight", "_dynamics.0.1.bias"} <= (
            content["model"].keys()
        )
        torch.save(content, tmp_path / "old.pt")
        model, report = load_tdmpc2_world_model(tmp_path / "old.pt")
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert report.mapped["_encoder.state.2.weight"] == "encoder.net.0.ln.weight"

    def test_of_the_golden_checkpoint(self, tmp_path):
        content = torch.load(GOLDEN / "tdmpc2_single.pt", weights_only=True)
        torch.save({"model": older(content["model"])}, tmp_path / "old.pt")
        expected = load_tdmpc2_world_model(GOLDEN / "tdmpc2_single.pt")[0].state_dict()
        found = load_tdmpc2_world_model(tmp_path / "old.pt")[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
    def test_wrapped_and_without_its_dictionary(self, prefix, tmp_path):
        expected = randomized(SPECS["single"])
        state = {prefix + name: value for name, value in published(expected)["model"].items()}
        torch.save(state, tmp_path / "state.pt")
        model, _ = load_tdmpc2_world_model(tmp_path / "state.pt")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())

    def test_any_other_is_named(self, tmp_path):
        torch.save({"model": {"backbone.0.weight": torch.zeros(2, 2)}}, tmp_path / "other.pt")
        with pytest.raises(ConfigurationError, match=r"other\.pt is not in TD-MPC2's format"):
            load_tdmpc2_world_model(tmp_path / "other.pt")
