"""Keys that are not used beside what is chosen are refused; the sentence says beside what they would be."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest

pytest.importorskip("hydra")

from pwm_torchrl.algorithm.pwm import PWM
from pwm_torchrl.algorithm.pwm_paper import PaperPWM
from pwm_torchrl.algorithm.shac import SHAC
from pwm_torchrl.choices import schema_choices, schema_keys
from pwm_torchrl.cli import prepare
from pwm_torchrl.cli.command_line import ANY, USAGE_RULES
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.run_requests import ComposedRun
from pwm_torchrl.config import DynamicsConfig
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics.factory import CLASSES, COMMON, KINDS, PARAMETERIZATIONS, make_dynamics, options_of


class Own(PWM):
    """An algorithm of a user, which differs from PWM in nothing that its settings say."""


class OwnPaper(PaperPWM):
    """Likewise."""


class OwnSHAC(SHAC):
    """Likewise."""


class UsesMore(PWM):
    """One that uses a key that PWM ignores, and neither counts sets nor accepts a horizon below 2."""

    ignored = (*(key for key in PWM.ignored if key != "lmbda"), "max_updates")
    least: ClassVar = {"horizon": 2}


class Mistaken(PWM):
    """One that misspells a key."""

    ignored = ("lambd",)


def own(algorithm: type, *words: str) -> list[str]:
    """Settings of a run of a user's algorithm."""
    return [f"algorithm.name={__name__}.{algorithm.__name__}", *words]


FLOWS = "model=few_step, flow_v1, flow_v2 or flow_v3"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=mlp", "model.dynamics.substeps=9"], ["substeps=9", "kind=mlp", FLOWS]),
        (["model=residual", "model.dynamics.solver=euler"], ["solver=euler", "kind=residual", FLOWS]),
        (["model=mlp", "model.dynamics={substeps: 9}"], ["model.dynamics.substeps=9", FLOWS]),
        (
            ["model=flow_v2", "model.dynamics.kind=mlp", "model.dynamics.checkpoint_substeps=true"],
            ["checkpoint_substeps=true", FLOWS],
        ),
        (["model=mlp", "model.loss.flow_matching_weight=1"], ["flow_matching_weight=1", "kind=mlp", FLOWS]),
        (
            ["model=flow_v2", "model.dynamics.parameterization=tangent", "model.dynamics.condition_on_step_size=true"],
            ["condition_on_step_size=true", "parameterization=tangent", "parameterization=residual_endpoint"],
        ),
        (
            ["model=flow_v2", "model.dynamics.parameterization=simnorm_velocity", "model.dynamics.time_features=2"],
            ["time_features=2", "residual_endpoint or tangent"],
        ),
        (
            ["model=flow_v2", "model.loss.flow_matching_source=attached"],
            ["flow_matching_source=attached", "flow_matching_weight"],
        ),
        (["model.num_bins=51"], ["model.num_bins=51", "model.reward_head=scalar", "model.reward_head=two_hot"]),
        (["logger.project=mine"], ["logger.project=mine", "logger.kind=csv", "logger=wandb"]),
        (["init_from_parts=[model]"], ["init_from_parts", "without init_from"]),
        (["data.path=store"], ["data.path=store", "mode=online", "experiment=extract or pretrain"]),
        (
            ["experiment=pretrain", "data.scratch_dir=x"],
            ["data.scratch_dir=x", "data.stage=none", "data.stage=scratch"],
        ),
        (
            ["algorithm=pwm_paper", "algorithm.temperature=1"],
            ["algorithm.temperature=1", "algorithm.name=pwm_paper", "algorithm.name=pwm (algorithm=pwm)"],
        ),
        (["algorithm.lmbda=0.9"], ["algorithm.lmbda=0.9", "algorithm.name=pwm_paper or shac"]),
        (own(Own, "algorithm.lmbda=0.9"), ["lmbda=0.9", f"{__name__}.Own", "pwm_paper or shac", "`ignored`"]),
        (own(Own, "algorithm.actor_updates=2"), ["algorithm.actor_updates=2", f"{__name__}.Own", "pwm_paper"]),
        (own(Own, "algorithm.updates_per_step=99"), ["updates_per_step=99", "algorithm.max_updates=64"]),
        (own(OwnPaper, "algorithm.temperature=1"), ["temperature=1", f"{__name__}.OwnPaper", "algorithm=pwm"]),
        (own(OwnPaper, "algorithm.horizon=0"), ["algorithm.horizon=0", "at least 1", f"{__name__}.OwnPaper"]),
        (own(OwnSHAC, "env=pendulum_torchrl", "size.latent_dim=64"), ["size.latent_dim=64", f"{__name__}.OwnSHAC"]),
        (own(UsesMore, "algorithm.max_updates=9"), ["max_updates=9", f"{__name__}.UsesMore", "algorithm=pwm"]),
        (own(UsesMore, "algorithm.horizon=1"), ["algorithm.horizon=1", "at least 2"]),
        (own(Mistaken), [f"{__name__}.Mistaken", "ignored", "'lambd'", "nearest: lmbda"]),
        ([f"algorithm.name={__name__}.Nothing"], ["algorithm.name", "Nothing"]),
        (["algorithm=pwm_paper", "algorithm.horizon=0"], ["horizon=0", "at least 1", "algorithm.name=pwm_paper"]),
        (
            ["algorithm=shac", "env=pendulum_torchrl", "algorithm.horizon=0"],
            ["horizon=0", "at least 1", "algorithm.name=shac"],
        ),
        (
            ["algorithm=shac", "env=pendulum_torchrl", "algorithm.model_updates=3"],
            ["algorithm.model_updates=3", "algorithm.name=shac"],
        ),
        (
            ["algorithm=shac", "env=pendulum_torchrl", "algorithm.slice_steps=7"],
            ["algorithm.slice_steps=7", "algorithm.name=shac", "algorithm.name=pwm or pwm_paper"],
        ),
        (["algorithm.actor_updates=2"], ["algorithm.actor_updates=2", "algorithm.name=pwm_paper"]),
        (
            ["algorithm=shac", "env=pendulum_torchrl", "model=mlp"],
            ["model=mlp", "algorithm.name=shac", "algorithm.name=pwm or pwm_paper"],
        ),
        (
            ["algorithm=shac", "env=pendulum_torchrl", "training.replay_capacity=500"],
            ["training.replay_capacity=500", "algorithm.name=shac"],
        ),
        (
            ["experiment=pretrain", "algorithm.actor_lr=1"],
            ["algorithm.actor_lr=1", "mode=pretrain", "mode=online or extract"],
        ),
        (
            ["experiment=extract", "algorithm=pwm", "algorithm.updates_per_step=1"],
            ["algorithm.updates_per_step=1", "mode=extract", "mode=online"],
        ),
        (
            ["experiment=pretrain", "algorithm=pwm", "algorithm.updates_per_step=1"],
            ["algorithm.updates_per_step=1", "mode=pretrain", "mode=online"],
        ),
        (
            ["experiment=pretrain", "algorithm=pwm", "algorithm.horizon=9"],
            ["algorithm.horizon=9", "algorithm.slice_steps=5", "algorithm.slice_steps=null"],
        ),
        (["algorithm.updates_per_step=1"], ["=1 asks for 128 sets", "algorithm.max_updates=64"]),
        (["experiment=pretrain", "algorithm.exploration_noise=white"], ["mode=pretrain", "mode=online"]),
        (["experiment=pretrain", "task=cup-catch"], ["task=cup-catch", "mode=pretrain", "mode=extract"]),
        (["experiment=extract", "algorithm.model_lr=1"], ["algorithm.model_lr=1", "finetune=false", "finetune=true"]),
        (["experiment=extract", "algorithm.collect_steps=2"], ["algorithm.collect_steps=2", "mode=online"]),
        (["device=cpu", "memory.device_gib=8"], ["memory.device_gib=8", "device=cpu"]),
        (["run_dir=here", "runs_dir=there"], ["runs_dir=there", "run_dir=here", "leave one of them out"]),
        (["cluster=local", "cluster.time=1:00:00"], ["cluster.time=1:00:00", "cluster.kind=local"]),
        (["cluster=local", "cluster.partition=gpu"], ["cluster.partition=gpu", "cluster.kind=local", "l40s"]),
        (["cluster=local", "cluster.sbatch.nice=3"], ["cluster.sbatch.nice=3", "cluster.kind=local", "l40s"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_is_refused_with_what_would_use_it(words, parts):
    with pytest.raises(ConfigurationError) as caught:
        compose(words)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "words",
    [
        ["model=flow_v1", "model.dynamics.substeps=9", "model.dynamics.time_features=2"],
        ["model=mlp", "model.dynamics.kind=flow", "model.dynamics.substeps=1"],
        ["model=mlp", "model.loss.flow_matching_weight=0", "model.dynamics.checkpoint_substeps=false"],
        ["model=flow_v2", "model.loss.flow_matching_weight=1", "model.loss.flow_matching_source=attached"],
        ["model.reward_head=two_hot", "model.num_bins=51", "model.vmin=-5"],
        ["logger=wandb", "logger.mode=offline"],
        ["cluster.partition=gpu"],
        ["cluster=local", "cluster.partition=null"],
        ["experiment=extract", "finetune=true", "algorithm.model_lr=1"],
        ["memory.device_gib=8"],
        ["experiment=pretrain", "algorithm=pwm_paper", "algorithm.horizon=9"],
        ["experiment=pretrain", "algorithm=pwm", "algorithm.slice_steps=null", "algorithm.horizon=9"],
        ["logger=tensorboard", "logger.also=[wandb]", "logger.project=x"],
        ["algorithm=shac", "env=pendulum_torchrl", "algorithm.random_steps=0"],
        ["cluster=local", "cluster.gpus=0", "cluster.setup=[]"],
        ["runs_dir=out", "run_dir=${runs_dir}/mine"],
        ["algorithm.updates_per_step=1", "algorithm.max_updates=128"],
        ["algorithm.updates_per_step=1", "env.num_envs=4"],
        ["algorithm.horizon=0"],
        own(Own, "algorithm.horizon=0", "algorithm.temperature=1"),
        own(UsesMore, "algorithm.lmbda=0.9", "algorithm.updates_per_step=99"),
        ["algorithm=shac", "env=pendulum_torchrl", "env.num_envs=70000"],  # there is no replay to be too small
    ],
    ids=" ".join,
)
def test_is_accepted_where_it_is_used(words):
    compose(words)


def test_a_preset_may_leave_such_keys_behind():
    """Only what is typed is refused: a model chosen beside a preset of another one stays possible."""
    config = compose(["experiment=dflex_ant_5m_flow_v3", "model=mlp"])
    assert config.model.dynamics.kind == "mlp"


def test_options_of_a_kind_are_those_that_it_is_made_with():
    assert {kind for kind, _ in CLASSES} == set(KINDS)
    assert {form for _, form in CLASSES if form is not None} == set(PARAMETERIZATIONS)
    for (kind, form), cls in CLASSES.items():
        made = make_dynamics(kind, 16, 2, 0, [16], **({"parameterization": form} if form else {}))
        assert type(made) is cls
    everything = {option for place in CLASSES for option in options_of(*place)}
    assert everything == set(vars(DynamicsConfig())) - {"kind"}
    assert everything | set(COMMON) | {"kind", "match_parameters"} == set(inspect.signature(make_dynamics).parameters)


def test_rules_about_dynamics_are_what_their_signatures_say():
    for option in sorted(set(vars(DynamicsConfig())) - {"kind"}):
        key, takes = f"model.dynamics.{option}", [place for place in CLASSES if option in options_of(*place)]
        ruled = {rule.depends_on: rule.values for rule in USAGE_RULES if rule.covers(key)}
        assert set(ruled["model.dynamics.kind"]) == {kind for kind, _ in takes}
        forms = set(ruled.get("model.dynamics.parameterization", PARAMETERIZATIONS))
        assert forms == {form for _, form in takes if form is not None}


def test_rules_are_about_keys_that_exist():
    keys = schema_keys()
    for rule in USAGE_RULES:
        for key in rule.keys:
            assert key.rstrip(".") in keys
        for by in rule.depends_on.split(", "):
            assert by in keys
        choices = schema_choices().get(rule.depends_on)
        assert rule.values in (ANY, (None,), (True,), ("all",)) or set(rule.values) <= set(choices or ())
        assert rule.only_if is None or rule.only_if[1] in schema_choices()[rule.only_if[0]]


def test_a_profile_of_ones_own_counts_as_typed(tmp_path, monkeypatch):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("kind: local\npartition: gpu\nhost_gib: 8\n")
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"cluster\.partition=gpu has no effect with cluster\.kind=local"):
        compose(["cluster=mine"])


@pytest.mark.parametrize("word", ["cluster.partition=gpu", "cluster.sbatch={exclusive:true}", "cluster.sbatch.nice=3"])
@pytest.mark.parametrize("place", [prepare.HERE, prepare.LOCAL, prepare.DEBUG])
def test_what_is_for_slurm_is_refused_where_no_job_is_queued(word, place):
    runs = [ComposedRun(compose([word]), [word])]
    with pytest.raises(ConfigurationError, match=r"is for SLURM jobs, but this run trains .*; leave it out"):
        prepare.refuse_slurm_keys(runs, place)
    prepare.refuse_slurm_keys(runs, prepare.SLURM)
    prepare.refuse_slurm_keys(
        [ComposedRun(compose([]), ["cluster.partition=null", "cluster.max_memory_restarts=9"])], place
    )


def test_inside_an_allocation_it_says_how_a_job_is_queued(monkeypatch):
    monkeypatch.setattr(prepare, "own_job", lambda: "77")
    runs = [ComposedRun(compose(["cluster.partition=gpu"]), ["cluster.partition=gpu"])]
    with pytest.raises(ConfigurationError) as caught:
        prepare.refuse_slurm_keys(runs, prepare.HERE)
    for part in ("cluster.partition=gpu", "allocation of job 77", "leave it out", "cluster=NAME"):
        assert part in str(caught.value)
