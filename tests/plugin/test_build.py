"""What importing the configurations adds to TorchRL's, and that each entry is its constructor's."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import _locate
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, OmegaConf
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler

from pwm_torchrl import configs, modules
from pwm_torchrl.configs import ENTRIES, register
from pwm_torchrl.envs import LatentImaginationEnv
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.objectives import PWMActorLoss
from pwm_torchrl.plugin import build

#: What stands behind the functions that turn Hydra's values into what a constructor wants.
BEHIND = {
    "world_model": modules.WorldModelSpec,
    "encoder_model": modules.encoder_module,
    "world_model_model": modules.world_model_module,
    "actor_model": modules.actor_module,
    "value_model": modules.value_module,
    "policy_model": modules.policy_module,
    "actor_loss": PWMActorLoss,
    "slice_sampler": SliceSampler,
    "imagination_env": LatentImaginationEnv,
}
HYDRAS = {"_target_", "_partial_", "_convert_", "_recursive_"}
SIZES = {"latent_dim": 16, "action_dim": 2, "units": [32]}


def defaults_of(constructor) -> dict:
    """A constructor's arguments with their defaults, or ``MISSING``."""
    if dataclasses.is_dataclass(constructor):
        made = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
                for f in dataclasses.fields(constructor)
                if f.default_factory is not dataclasses.MISSING or f.default is not dataclasses.MISSING}  # fmt: skip
    else:
        made = {}
    # Of a class, the metaclass may hide the signature.
    signature = inspect.signature(constructor.__init__ if inspect.isclass(constructor) else constructor)
    return {
        name: made.get(name, MISSING if p.default is inspect.Parameter.empty else p.default)
        for name, p in signature.parameters.items()
        if name != "self" and p.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }


def plain(value):
    """Tuples as lists, as a configuration holds them."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("group", "name"), ENTRIES)
def test_fields_and_defaults_are_the_constructors(group, name):
    node = ENTRIES[group, name]
    found = OmegaConf.to_container(OmegaConf.structured(node))
    target = found["_target_"]
    home, _, last = target.rpartition(".")
    constructor = BEHIND[last] if home == "pwm_torchrl.plugin.build" else _locate(target)
    expected = {key: plain(value) for key, value in defaults_of(constructor).items()}
    fields = {key: value for key, value in found.items() if key not in HYDRAS}
    if not inspect.isclass(node):  # a preset says what it sets
        for key in ("solver", "substeps"):
            fields[key] = expected[key]
    assert fields == expected


def test_presets_are_the_applications_flows():
    from pwm_torchrl.cli.compose import compose

    for name in ("flow_v1", "flow_v2", "flow_v3"):
        dynamics, preset = compose([f"model={name}"]).model.dynamics, ENTRIES["network", f"pwm_{name}"]
        assert (preset.solver, preset.substeps) == (dynamics.solver, dynamics.substeps)


def contents() -> dict:
    repo = ConfigStore.instance().repo
    groups = ("loss", "model", "network", "env", "trainer", "sampler")
    return {(group, name): node.node for group in groups for name, node in repo[group].items()}


def test_registering_overwrites_nothing_and_is_idempotent():
    from torchrl.trainers.algorithms.configs import _register_configs

    before = contents()
    register()
    assert contents() == before
    ours = {(group, f"{name}.yaml") for group, name in ENTRIES}
    assert {key for key in before if key[1].startswith("pwm")} == ours
    _register_configs()
    assert contents() == before


def test_every_group_of_the_plugin_has_its_entries():
    assert {group for group, _ in ENTRIES} == {"loss", "model", "network", "env", "trainer", "sampler"}
    assert set(configs.__all__) - {"ENTRIES", "register"} == {
        (node if inspect.isclass(node) else type(node)).__name__ for node in ENTRIES.values()
    }


PROGRAM = """
import sys
{imports}
from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
with initialize(config_path=None, version_base="1.3"):
    compose(overrides=[{overrides}])
found = "pwm_model.yaml" in ConfigStore.instance().repo.get("loss", [])
print("torch" in sys.modules, "pwm_torchrl" in sys.modules, found)
"""


@pytest.mark.parametrize(
    ("imports", "overrides", "expected"),
    [
        pytest.param("import pwm_torchrl", "", "False True False", id="another program"),
        pytest.param(
            "import torchrl.trainers.algorithms.configs",
            "'+loss=pwm_model'",
            "True True True",
            marks=pytest.mark.slow,
            id="a TorchRL program",
        ),
    ],
)
def test_hydra_finds_the_entries_where_torchrl_is_in_use(imports, overrides, expected):
    program = PROGRAM.format(imports=imports, overrides=overrides)
    root = Path(configs.__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.split() == expected.split(), done.stderr


def structured(group, name, **values):
    return OmegaConf.merge(OmegaConf.structured(ENTRIES[group, name]), values)


DYNAMICS = [name for group, name in ENTRIES if OmegaConf.structured(ENTRIES[group, name])._target_ in build.DYNAMICS]


@pytest.mark.parametrize("name", DYNAMICS)
def test_dynamics_by_themselves_and_in_a_world_model(name):
    alone = instantiate(structured("network", name, task_dim=0, **SIZES))
    assert alone(torch.zeros(3, 16), torch.zeros(3, 2)).shape == (3, 16)
    dynamics = structured("network", name)
    spec = dict(observation_dim=5, encoder_units=[32], **SIZES)
    model = instantiate(structured("network", "pwm_world_model", dynamics=dynamics, **spec))
    assert type(model.dynamics) is type(alone)
    assert getattr(model.dynamics, "substeps", None) == getattr(alone, "substeps", None)
    assert model(model.encode(torch.zeros(3, 5)), torch.zeros(3, 2))[0].shape == (3, 16)


def test_world_model_takes_arguments_of_make_dynamics():
    spec = dict(observation_dim=5, encoder_units=[32], **SIZES)
    model = instantiate(structured("network", "pwm_world_model", dynamics={"kind": "residual"}, **spec))
    assert isinstance(model.dynamics, modules.ResidualDynamics)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        ({"_target_": "torch.nn.Linear"}, "world_model.dynamics._target_='torch.nn.Linear' is not one of"),
        ({"_target_": "pwm_torchrl.modules.MLPDynamics", "latent_dim": 8}, "dynamics.latent_dim=8 differs"),
        ({"_target_": "pwm_torchrl.modules.MLPDynamics", "kind": "flow"}, "dynamics.kind='flow' contradicts"),
    ],
)
def test_dynamics_that_do_not_fit_their_world_model(dynamics, message):
    spec = dict(observation_dim=5, encoder_units=[32], **SIZES)
    with pytest.raises(ConfigurationError, match=message):
        build.world_model(dynamics=dynamics, **spec)


def test_models_wrap_networks_with_nested_keys():
    spec = dict(observation_dim=5, encoder_units=[32], **SIZES)
    world_model = OmegaConf.to_container(structured("network", "pwm_world_model", **spec))
    encoder = instantiate(structured("model", "pwm_encoder", world_model=world_model, latent=["agent", "latent"]))
    assert encoder.out_keys == [("agent", "latent")]
    step = instantiate(structured("model", "pwm_world_model", world_model=world_model))
    assert step.out_keys == [("next", "latent"), ("next", "reward"), ("next", "terminated")]
    actor = OmegaConf.to_container(structured("network", "pwm_actor", latent_dim=16, action_dim=2))
    critics = OmegaConf.to_container(structured("network", "pwm_critic_ensemble", latent_dim=16))
    policy = instantiate(structured("model", "pwm_policy", world_model=world_model, actor=actor))
    assert policy(TensorDict(observation=torch.zeros(3, 5), batch_size=[3]))["action"].shape == (3, 2)
    data = TensorDict(latent=torch.zeros(3, 16), batch_size=[3])
    assert instantiate(structured("model", "pwm_actor", actor=actor))(data)["action"].shape == (3, 2)
    value = instantiate(structured("model", "pwm_critic_ensemble", critics=critics))
    assert value(data)["state_value"].shape == (3, 1)
    networks = {
        "actor_network": OmegaConf.to_container(structured("model", "pwm_actor", actor=actor)),
        "world_model": OmegaConf.to_container(structured("model", "pwm_world_model", world_model=world_model)),
        "value_network": OmegaConf.to_container(structured("model", "pwm_critic_ensemble", critics=critics)),
    }
    loss = instantiate(structured("loss", "pwm_actor", horizon=3, action_mask=[[1, 0], [1, 1]], **networks))
    assert loss.action_mask.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert loss.horizon == 3
    model_loss = instantiate(structured("loss", "pwm_model", world_model=world_model, rho=0.5))
    assert model_loss.out_keys == ["loss_dynamics", "loss_reward"]
    assert instantiate(structured("loss", "pwm_value", critics=critics)).in_keys == ["latent", "value_target"]


@pytest.mark.parametrize(
    "keys", [{"end_key": ["next", "done"]}, {"traj_key": ["collector", "traj_ids"]}, {"end_keys": [["next", "done"]]}]
)
def test_slices_of_trajectories_through_hydra(keys):
    sampler = instantiate(structured("sampler", "pwm_slices", slice_len=4, **keys))
    assert sampler.truncated_key == ("next", "truncated")
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), sampler=sampler, batch_size=32)
    steps = torch.arange(60)
    done = (steps % 20 == 19).unsqueeze(-1)
    data = TensorDict(
        step=steps, next=TensorDict(done=done, truncated=done, batch_size=[60]), batch_size=[60],
        collector=TensorDict(traj_ids=steps // 20, batch_size=[60]),
    )  # fmt: skip
    buffer.extend(data)
    drawn = buffer.sample().reshape(8, 4)["step"]
    assert (drawn.diff(dim=1) == 1).all()
    assert (drawn[:, 0] // 20 == drawn[:, -1] // 20).all()


def test_environment_of_a_configuration():
    env = instantiate(structured("env", "pwm_gymnasium", id="Pendulum-v1", num_envs=2))
    assert env.batch_size == (2,)
    assert env.action_spec.space.high.max() == 1
    env.close()


def test_imagination_of_a_configuration():
    spec = dict(observation_dim=5, encoder_units=[32], **SIZES)
    world_model = OmegaConf.to_container(structured("network", "pwm_world_model", **spec))
    start = torch.softmax(torch.randn(3, 2, 8), -1).flatten(1).tolist()
    values = {"world_model": world_model, "start": start, "horizon": 4, "batch_size": [6], "action_mask": [1, 0]}
    env = instantiate(structured("env", "pwm_imagination", latent_key=["agent", "latent"], **values))
    rollout = env.rollout(10)
    assert rollout["next", "agent", "latent"].shape == (6, 4, 16)
    assert rollout["next", "truncated"][:, -1].all()
