"""Every choice composes; what cannot work is one clear sentence."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

import yaml
from hydra.core.config_store import ConfigStore

from pwm_torchrl import config as schema
from pwm_torchrl.choices import configs_dir, group_choices, schema_keys, user_configs_dir
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.finalize import compose_and_finalize
from pwm_torchrl.cli.validate import value_of
from pwm_torchrl.config import RENAMED_KEYS
from pwm_torchrl.errors import ConfigurationError

NEEDED = {
    "gymnasium": ["env.id=Walker2d-v5"],
    "brax": ["env.id=ant"],
    "dm_control": ["env.domain=walker", "env.task=walk"],
    "custom": ["env._target_=my_pkg.make_env"],
    "task": ["env.task=walker-walk"],
}
#: Presets of runs on stored episodes, which have to be there: see test_modes.py.
STORED = ("pretrain", "extract", "mt30_pretrain", "mt80_pretrain", "mt30", "mt80")
ALL_CHOICES = [
    (group, choice)
    for group, choices in group_choices().items()
    for choice in choices
    if not (group == "experiment" and choice in STORED)
]


def error_of(*words: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        compose(list(words))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


@pytest.mark.parametrize(("group", "choice"), ALL_CHOICES, ids="=".join)
def test_every_choice_composes(group, choice):
    config = compose([f"{group}={choice}", *(NEEDED.get(choice, []) if group == "env" else [])])
    assert isinstance(config, schema.Config)
    assert type(config.env) is dict
    if group in ("model", "size"):
        assert getattr(config, group).name == choice


def test_defaults_are_the_quick_start():
    config = compose()
    assert (config.model.name, config.size.name, config.env["name"]) == ("residual", "tiny", "pendulum")
    assert config.env["num_envs"] == 8
    assert config.training.epochs < schema.TrainingConfig().epochs


@pytest.mark.parametrize(
    ("name", "kind", "solver", "substeps"),
    [
        ("mlp", "mlp", None, None),
        ("residual", "residual", None, None),
        ("flow_v1", "flow", "heun", 2),
        ("flow_v2", "flow", "heun", 4),
        ("flow_v3", "flow", "euler", 8),
    ],
)
@pytest.mark.parametrize("size", ["5m", "48m"])
def test_presets_carry_their_system(size, name, kind, solver, substeps):
    config = compose([f"experiment=dflex_ant_{size}_{name}"])
    assert (config.model.name, config.size.name, config.env["name"]) == (name, size, "dflex_ant")
    assert config.model.dynamics.kind == kind
    if solver:
        assert (config.model.dynamics.solver, config.model.dynamics.substeps) == (solver, substeps)
    assert config.algorithm.horizon == 16
    assert config.algorithm.model_batch == {"5m": 256, "48m": 1024}[size]
    assert config.training.epochs == (20_000 if size == "48m" and kind == "flow" else 15_000)
    assert config.env["num_envs"] == 128


@pytest.mark.parametrize(
    ("size", "units", "encoder", "latent"),
    [
        ("5m", 2 * [512], [256], 512),
        ("19m", 2 * [1024], 2 * [1024], 768),
        ("48m", 2 * [1792], 3 * [1792], 768),
        ("317m", 2 * [4096], 4 * [4096], 1376),
    ],
)
def test_sizes(size, units, encoder, latent):
    found = compose([f"size={size}"]).size
    assert (found.units, found.encoder_units, found.latent_dim) == (units, encoder, latent)


def test_the_command_line_wins_over_environment_and_experiment():
    assert compose(["training.epochs=7"]).training.epochs == 7
    config = compose(["experiment=dflex_ant_48m_flow_v2", "model=mlp", "env=pendulum", "training.epochs=7"])
    assert (config.model.name, config.env["name"], config.training.epochs) == ("mlp", "pendulum", 7)
    assert config.algorithm.model_batch == 1024


def test_quick_start_length_belongs_to_its_environment():
    assert compose(["env=hopper"]).training.epochs == schema.TrainingConfig().epochs


def test_custom_target_selects_the_custom_group():
    env = compose(["env._target_=my_pkg.make_env", "env.gravity=3.5", "env.num_envs=2"]).env
    assert env == {"_target_": "my_pkg.make_env", "name": "my_pkg.make_env", "num_envs": 2, "gravity": 3.5}


def test_custom_target_wins_over_a_preset():
    config = compose(["experiment=dflex_ant_5m_mlp", "env._target_=my_pkg.make_env"])
    assert config.env["_target_"] == "my_pkg.make_env"
    assert "episode_length" not in config.env


def test_current_folder_is_importable(workdir, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (workdir / "pwm_test_pkg.py").write_text("def make_env(): ...\n")
    compose(["env._target_=pwm_test_pkg.make_env"])
    import pwm_test_pkg

    assert pwm_test_pkg.make_env() is None


def test_no_output_folder_and_no_change_of_directory(workdir):
    compose(["model=mlp"])
    assert Path.cwd() == workdir
    assert list(workdir.iterdir()) == []


def test_paths_are_text():
    path = "/some where/a=b (c) [d], it's {e}"
    assert compose([f"run_dir={path}"]).run_dir == path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=flwo_v2"], ["'flwo_v2'", "nearest: flow_v2", "mlp, residual"]),
        (["env=pendlum"], ["'pendlum'", "nearest: pendulum"]),
        (["experiment=dflex_ant_48m_flowv2"], ["nearest: dflex_ant_48m_flow_v2"]),
        (["model=[mlp,flow_v1]"], ["is not a choice of model"]),
        (["experiment=null"], ["'null' is not a choice of experiment", "choices of experiment: "]),
        (["~model"], ["'~model'", "model=CHOICE"]),
        (["algorithm.horizn=8"], ["unknown key 'algorithm.horizn'", "nearest: algorithm.horizon"]),
        (["horizon=8"], ["unknown key 'horizon'", "algorithm.horizon"]),
        (["modle=mlp"], ["unknown key 'modle'", "nearest: mode, model"]),
        (["+algorithm.horizn=8"], ["unknown key 'algorithm.horizn'"]),
        (["env.num_env=8"], ["unknown key 'env.num_env'", "nearest: env.num_envs", "+env.num_env"]),
        (["seed=1", "seed=abc"], ["seed=abc", "'abc' is not an integer"]),
        (["seed=abc", "seed=1"], ["seed=abc", "'abc' is not an integer"]),
        (["size.units=[1]", "size.units=x"], ["size.units=x", "'x' is not a list"]),
        (["algorithm.horizon=abc"], ["algorithm.horizon=abc", "'abc' is not an integer"]),
        (["algorithm.horizon=1.5"], ["'1.5' is not an integer"]),
        (["algorithm.horizon=null"], ["'null' is not an integer"]),
        (["algorithm.gamma=high"], ["'high' is not a number"]),
        (["training.video=maybe"], ["'maybe' is not true or false"]),
        (["algorithm.horizon=8", "algorithm.horizon=abc"], ["algorithm.horizon=abc: 'abc'"]),
        (["algorithm.horizon=abc", "algorithm.horizon=8"], ["algorithm.horizon=abc: 'abc'"]),
        (["size.units=3"], ["size.units=3", "a list of integers"]),
        (["size.units=${seed}"], ["size.units=0", "a list of integers"]),
        (["size.units=${algorithm.actor_betas}"], ["size.units=[0.9, 0.999]", "a list of integers"]),
        (["algorithm.actor_betas=${seed}"], ["algorithm.actor_betas=0", "a list of numbers"]),
        (["model.dynamics=${size}"], ["model.dynamics", "section"]),
        (["algorithm.log_std_init=nan"], ["algorithm.log_std_init=nan", "not a number"]),
        (["algorithm.log_std_min=-inf"], ["algorithm.log_std_min=-inf", "finite"]),
        (["algorithm.actor_betas=[0.5,nan]"], ["algorithm.actor_betas=", "not a number"]),
        (["algorithm.gamma=nan"], ["algorithm.gamma=nan", "not a number"]),
        (["Model=mlp"], ["'Model'", "nearest: model"]),
        (["model.dynamics.kind=FLW"], ["model.dynamics.kind=FLW", "nearest: flow"]),
        (["training.steps=1.5"], ["training.steps=1.5", "not an integer"]),
        (["training.steps=0"], ["training.steps=0", "at least 1"]),
        (["training.steps=1e5", "training.epochs=7"], ["training.steps=100000", "training.epochs=7", "give one"]),
        (["experiment=pretrain", "training.steps=1e5"], ["training.steps=100000", "mode=pretrain", "training.epochs"]),
        (["experiment=extract", "training.steps=1e5"], ["training.steps=100000", "mode=extract", "training.epochs"]),
        (["algorithm.actor_betas=[a]"], ["algorithm.actor_betas", "a list of numbers"]),
        (["model.dynamics=5"], ["model.dynamics=5", "section"]),
        (["env.num_envs=many"], ["env.num_envs=many", "is not an integer"]),
        (["size.latent_dim=60"], ["size.latent_dim=60", "size.simnorm_dim=8"]),
        (["model.dynamics.substeps=0"], ["model.dynamics.substeps=0", "at least 1"]),
        (["algorithm.critic_betas=[0.9,1.0]"], ["algorithm.critic_betas=[0.9, 1.0]", "[0, 1)"]),
        (["algorithm.horizon=201"], ["algorithm.horizon=201", "episode", "200"]),
        (["model.dynamics.kind=flw"], ["model.dynamics.kind=flw", "nearest: flow", "flow, mlp, residual"]),
        (["model.dynamics.solver=rk4"], ["model.dynamics.solver=rk4", "heun, euler"]),
        (["model.reward_head=twohot"], ["nearest: two_hot"]),
        (["logger.kind=wnb"], ["nearest: wandb"]),
        (["device=gpu"], ["device=gpu", "cuda:N"]),
        (["algorithm.model_lr=0"], ["algorithm.model_lr=0", "above 0"]),
        (["algorithm.gamma=1.5"], ["algorithm.gamma=1.5", "(0, 1]"]),
        (["size.units=[]"], ["size.units=[]", "one or more"]),
        (["training.replay_capacity=10"], ["training.replay_capacity=10", "slice_steps=5", "48"]),
        (["memory.model_micro_batch=512"], ["memory.model_micro_batch=512", "algorithm.model_batch=64"]),
        (["model=flow_v2", "model.loss.self_consistency_weight=1"], ["model.dynamics.condition_on_step_size=true"]),
        (["model=few_step", "model.loss.few_step_rollout=true"], ["model.loss.flow_matching_weight above 0"]),
        (["env._target_=nodots"], ["env._target_=nodots", "my_pkg.make_env"]),
        (["env=custom"], ["env._target_ has no value", "my_pkg.make_env"]),
        (["env=gymnasium"], ["env.id has no value", "HalfCheetah-v5"]),
        (["env=dm_control", "env.domain=walker"], ["env.task has no value"]),
        (["seed=1,2"], ["'seed=1,2'", "several runs"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["flow_v2"], ["'flow_v2' is not a setting", "key=value"]),
        (["a=[b"], ["cannot read 'a=[b'"]),
        (["--modle"], ["unknown option --modle"]),
        (["hydra.job.chdir=true"], ["Hydra's own settings"]),
        (["~seed"], ["'~seed'"]),
        (["+seed=3"], ["seed"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_bad_input_is_one_clear_sentence(words, parts):
    message = error_of(*words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("model=MLP", "model.name", "mlp"),
        ("size=5M", "size.name", "5m"),
        ("env=HalfCheetah", "env.id", "HalfCheetah-v5"),
        ("logger=WandB", "logger.kind", "wandb"),
        ("model.reward_head=Two_Hot", "model.reward_head", "two_hot"),
        ("training.replay_capacity=1e6", "training.replay_capacity", 1_000_000),
        ("training.epochs=1_000", "training.epochs", 1000),
        ("env.num_envs=1e1", "env.num_envs", 10),
        ("training.checkpoint_minutes=inf", "training.checkpoint_minutes", float("inf")),
    ],
)
def test_several_ways_of_writing_a_value(word, key, value):
    assert value_of(compose([word]), key) == value


@pytest.mark.parametrize("written", ["1e4", "10_000", "10000", "1.0e+4"])
def test_a_length_in_environment_steps(written):
    """Rounded up to whole epochs, of 8 environments and 16 steps."""
    training = compose([f"training.steps={written}"]).training
    assert (training.epochs, training.steps) == (79, 10_000)


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (["training.steps=256"], 2),
        (["training.steps=257"], 3),
        (["training.steps=1"], 1),
        (["training.steps=80", "algorithm.collect_steps=5"], 2),
        (["training.steps=320", "algorithm.collect_steps=5", "env=cartpole_swingup"], 4),
        (["training.steps=320", "algorithm.collect_steps=5", "env.action_repeat=4"], 2),
    ],
)
def test_steps_count_every_environment_and_the_action_repeat(words, epochs):
    assert compose(words).training.epochs == epochs


def test_steps_of_an_environment_of_ones_own(workdir):
    """Its action repeat is its own affair, and is asked of it."""
    (workdir / "pwm_repeating.py").write_text(
        "from torchrl.envs import GymEnv\n\ndef make():\n    return GymEnv('Pendulum-v1', frame_skip=3)\n"
    )
    config = compose_and_finalize(
        ["env._target_=pwm_repeating.make", "training.steps=384", "algorithm.collect_steps=4"]
    )
    assert config.training.epochs == 4  # of 8 environments, 4 steps each, 3 environment steps per step


def test_epochs_that_are_typed_win_over_steps_of_a_preset(tmp_path, monkeypatch):
    copy = tmp_path / "configs"
    shutil.copytree(configs_dir(), copy)
    preset = copy / "experiment" / "long.yaml"
    preset.write_text("# @package _global_\ntraining:\n  steps: 2560\n")
    for module in ("cli.compose", "choices"):
        monkeypatch.setattr(f"pwm_torchrl.{module}.configs_dir", lambda: copy)
    assert compose(["experiment=long"]).training.epochs == 20
    training = compose(["experiment=long", "training.epochs=7"]).training
    assert (training.epochs, training.steps) == (7, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "dynamics:\n  knid: mlp\n",
            "mlp.yaml: unknown key 'model.dynamics.knid'; nearest: model.dynamics.kind",
        ),
        ("dynamics:\n  substeps: x\n", "configs/model/mlp.yaml: model.dynamics.substeps: 'x' is not an integer"),
        ("dynamics: [mlp\n", "is not readable YAML"),
    ],
)
def test_files_are_checked_as_the_command_line_is(tmp_path, monkeypatch, text, sentence):
    copy = tmp_path / "configs"
    shutil.copytree(configs_dir(), copy)
    (copy / "model" / "mlp.yaml").write_text("name: mlp\n" + text)
    monkeypatch.setattr("pwm_torchrl.cli.compose.configs_dir", lambda: copy)
    assert sentence in error_of("model=mlp")


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (["model=flow_v2", "model.dynamics.substeps=1"], "flow_heun_k1"),
        (["model=flow_v3", "model.dynamics.substeps=2"], "flow_euler_k2"),
        (["model=flow_v2", "model.dynamics.substeps=2"], "flow_v1"),
        (["model=flow_v2", "model.dynamics.substeps=4"], "flow_v2"),
        (["model=flow_v2", "model.dynamics.parameterization=tangent"], "flow_v2_tangent"),
        (["model=flow_v2", "model.dynamics.kind=mlp"], "mlp"),
        (["model=flow_v2", "model.dynamics={kind: mlp}"], "mlp"),
        (["model=flow_v2", "model.dynamics.condition_on_start=true"], "flow_v2"),
        (["model=flow_v2", "model.dynamics.substeps=1", "model.name=mine"], "mine"),
        (["model=flow_v2", "model.dynamics.imagination_substeps=1"], "flow_v2_few1"),
        (["model=few_step"], "few_step"),
    ],
)
def test_a_flow_with_other_substeps_is_not_called_v2(words, label):
    assert compose(words).model.name == label


def test_a_changed_size_is_not_called_by_its_old_name():
    assert compose(["size.latent_dim=32"]).size.name == "tiny_custom"


def test_a_profile_of_ones_own_is_one_file(tmp_path, monkeypatch):
    folder = tmp_path / "it's [mine], (x)=1"
    (folder / "cluster").mkdir(parents=True)
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(folder))
    profile = folder / "cluster" / "site-a.yaml"
    profile.write_text("defaults:\n  - l40s\n  - _self_\npartition: gpu\ntime: 1-12:00:00\n")
    assert "site-a" in group_choices()["cluster"]
    cluster = compose(["cluster=site-a", "cluster.qos=fast"]).cluster
    assert (cluster.kind, cluster.name, cluster.partition, cluster.qos) == ("slurm", "site-a", "gpu", "fast")
    assert (cluster.gpu, cluster.gpus, cluster.time_min) == ("l40s", 1, 36 * 60)
    assert "site-a" in error_of("cluster=sitea")
    profile.write_text("partion: gpu\n")
    assert f"{profile}: unknown key 'cluster.partion'; nearest: cluster.partition" in error_of("cluster=site-a")
    profile.write_text("partition: [gpu\n")
    assert str(profile) in error_of("cluster=site-a")
    (folder / "cluster" / "l40s.yaml").write_text("partition: gpu\n")
    assert "give the file another name" in error_of("cluster=l40s")
    assert compose(["cluster=h100"]).cluster.name == "h100"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"PWM_TORCHRL_CONFIG_DIR": "/site"}, "/site"),
        ({"XDG_CONFIG_HOME": "/xdg"}, "/xdg/pwm_torchrl"),
        ({"HOME": "/me"}, "/me/.config/pwm_torchrl"),
        ({"HOME": "/me", "PWM_TORCHRL_CONFIG_DIR": "~/own"}, "/me/own"),
    ],
)
def test_where_profiles_of_ones_own_are(monkeypatch, variables, folder):
    for name in ("PWM_TORCHRL_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert user_configs_dir() == Path(folder)


@pytest.mark.parametrize("file", sorted((configs_dir() / "cluster").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_commented_keys_of_a_profile_can_be_used(file, tmp_path, monkeypatch):
    lines = file.read_text().splitlines()
    used = [re.sub(r"^# (?=[a-z_]+: )", "", line) for line in lines[1:]]
    keys = {line.partition(":")[0] for line in used if re.match(r"\w+: ", line)}
    if "kind: slurm" in lines:
        assert keys >= {"partition", "account", "qos", "constraint", "gres", "cpus", "mem_gib", "host_gib"}
        assert keys >= {"time", "max_time_min", "signal_delay_s", "setup"}
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "all.yaml").write_text("\n".join(used))
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    cluster = compose(["cluster=all"]).cluster
    assert all(getattr(cluster, key) is not None for key in keys - {"time", "gpu"})


def test_every_file_begins_with_a_comment():
    for file in configs_dir().glob("*/*.yaml"):
        text = file.read_text()
        assert text.startswith("#"), file
        assert isinstance(yaml.safe_load(text), dict), file


def test_torchrls_entries_are_no_schema_of_ours():
    """Hydra would validate ``logger/csv`` against TorchRL's entry of that name, and warn."""
    from torchrl.trainers.algorithms import configs

    assert configs.CSVLoggerConfig is not None
    assert compose(["logger=csv"]).logger.kind == "csv"
    assert "csv.yaml" in ConfigStore.instance().repo["logger"]


class TestEarlierKeys:
    def test_are_accepted_and_their_new_names_told(self, capsys, monkeypatch):
        monkeypatch.setattr("pwm_torchrl.cli.compose._TOLD", set())
        config = compose(["algorithm=pwm_paper", "algorithm.policy_updates=5", "algorithm.policy_betas=[0.5,0.9]"])
        assert config.algorithm.actor_updates == 5
        assert config.algorithm.actor_betas == config.algorithm.critic_betas == [0.5, 0.9]
        told = capsys.readouterr().err
        assert "algorithm.policy_updates was renamed to algorithm.actor_updates" in told
        assert "algorithm.actor_betas and algorithm.critic_betas" in told

    @pytest.mark.parametrize(
        ("word", "key", "value"),
        [
            ("memory.host_gb=16", "memory.host_gib", 16e9 / 2**30),
            ("memory.disk_above_gb=1e3", "memory.disk_above_gib", 1e12 / 2**30),
            ("cluster.host_gb=64", "cluster.host_gib", 64e9 / 2**30),
            ("cluster.mem_gb=3", "cluster.mem_gib", 3),
            ("memory.device_gb=null", "memory.device_gib", None),
        ],
    )
    def test_gigabytes_become_gib(self, word, key, value, capsys, monkeypatch):
        monkeypatch.setattr("pwm_torchrl.cli.compose._TOLD", set())
        assert value_of(compose([word]), key) == (value if value is None else pytest.approx(value))
        assert key in capsys.readouterr().err

    def test_of_a_profile_the_new_name_is_told(self, tmp_path, monkeypatch):
        (tmp_path / "cluster").mkdir()
        (tmp_path / "cluster" / "mine.yaml").write_text("kind: slurm\nhost_gb: 64\n")
        monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
        message = error_of("cluster=mine")
        assert "mine.yaml" in message
        assert "cluster.host_gb was renamed to cluster.host_gib" in message
        assert "0.9313" in message

    def test_every_new_name_is_a_key(self):
        for old, now in RENAMED_KEYS.items():
            assert old not in schema_keys()
            assert set(now) <= schema_keys().keys()
