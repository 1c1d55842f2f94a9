"""The configuration's schema: what its fields accept, and that choices and defaults are those of the library."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from pwm_torchrl.choices import key_comments, schema_choices, schema_keys, sizes
from pwm_torchrl.config import (
    ALGORITHMS,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    DynamicsConfig,
    MemoryConfig,
    ModelConfig,
    ModelLossConfig,
    SizeConfig,
    TrainingConfig,
)
from pwm_torchrl.data import replay
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import Actor, CriticEnsemble, WorldModelSpec, heads, make_dynamics, world_model
from pwm_torchrl.modules.dynamics import factory
from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, model_loss

WIDTHS = {"latent_dim": 16, "units": [8], "encoder_units": [8]}


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        (AlgorithmConfig, {"gamma": 1.5}, ["algorithm.gamma=1.5", "(0, 1]"]),
        (AlgorithmConfig, {"gamma": 0}, ["algorithm.gamma=0", "(0, 1]"]),
        (AlgorithmConfig, {"horizon": -1}, ["algorithm.horizon=-1", "at least 0"]),
        (AlgorithmConfig, {"model_lr": 0.0}, ["algorithm.model_lr=0.0", "above 0"]),
        (AlgorithmConfig, {"model_lr": math.nan}, ["algorithm.model_lr=nan", "not a number"]),
        (AlgorithmConfig, {"critic_lr": math.inf}, ["algorithm.critic_lr=inf", "finite"]),
        (AlgorithmConfig, {"log_std_init": math.inf}, ["algorithm.log_std_init=inf", "finite"]),
        (AlgorithmConfig, {"actor_betas": [0.9]}, ["algorithm.actor_betas=[0.9]", "2"]),
        (AlgorithmConfig, {"actor_betas": [0.9, 1.0]}, ["algorithm.actor_betas=[0.9, 1.0]", "[0, 1)"]),
        (AlgorithmConfig, {"name": "pwm_papr"}, ["algorithm.name=pwm_papr", "nearest: pwm_paper", *ALGORITHMS]),
        (DynamicsConfig, {"solver": "hein"}, ["model.dynamics.solver=hein", "nearest: heun", "euler"]),
        (ModelLossConfig, {"rho": -0.1}, ["model.loss.rho=-0.1", "at least 0"]),
        (ModelConfig, {"vmin": 3.0, "vmax": 3.0}, ["model.vmin=3.0", "model.vmax=3.0"]),
        (SizeConfig, {**WIDTHS, "latent_dim": 33}, ["size.latent_dim=33", "size.simnorm_dim=8"]),
        (SizeConfig, {**WIDTHS, "units": []}, ["size.units=[]", "one or more"]),
        (SizeConfig, {**WIDTHS, "units": [8, 0]}, ["size.units=[8, 0]", "at least 1"]),
        (MemoryConfig, {"margin": 1.0}, ["memory.margin=1.0", "[0, 1)"]),
        (MemoryConfig, {"host_gib": 0.0}, ["memory.host_gib=0.0", "above 0"]),
        (TrainingConfig, {"replay_storage": "disc"}, ["training.replay_storage=disc", "nearest: disk"]),
        (ClusterConfig, {"gpus": -1}, ["cluster.gpus=-1", "at least 0"]),
        (Config, {"device": "gpu"}, ["device=gpu", "auto, cpu, cuda or cuda:N"]),
    ],
)
def test_what_is_not_accepted_is_named_with_what_is(section, values, parts):
    with pytest.raises(ConfigurationError) as caught:
        section(**values)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_is_accepted():
    AlgorithmConfig(gamma=1.0, lmbda=0.0, actor_grad_norm=math.inf, name="my_package.Mine", first_model_updates=None)
    DynamicsConfig(kind="my_package.MyDynamics")
    TrainingConfig(checkpoint_minutes=math.inf, steps=None)
    for device in ("auto", "cpu", "cuda", "cuda:3"):
        Config(device=device)


def test_values_that_change_later_are_checked_with_the_whole():
    cfg = Config(size=SizeConfig(**WIDTHS))
    cfg.check()
    cfg.model.dynamics.substeps = 0
    with pytest.raises(ConfigurationError, match=r"model\.dynamics\.substeps=0"):
        cfg.check()


def test_the_choices_are_the_librarys():
    choices = {key: set(accepted) for key, accepted in schema_choices().items()}
    assert choices["model.dynamics.kind"] == set(factory.KINDS)
    assert choices["model.dynamics.solver"] == set(factory.SOLVERS)
    assert choices["model.loss.form"] == set(model_loss.FORMS)
    assert choices["model.loss.flow_matching_source"] == set(model_loss.FLOW_MATCHING_SOURCES)
    assert choices["model.reward_head"] == set(world_model.REWARD_HEADS)
    assert choices["model.reward_space"] == set(heads.REWARD_SPACES)
    assert choices["training.replay_storage"] == {"auto", *replay.STORAGES}


#: Where a run deviates from the constructor: PWM's published choice, what only some algorithms use, and what follows
#: from the environment.
DEVIATES = {
    "normalize_returns",
    "temperature",
    "compile",
    "kind",
    "checkpoint_substeps",
    "task_dim",
    "latent_dim",
    "units",
    "encoder_units",
}


@pytest.mark.parametrize(
    ("section", "made"),
    [
        (DynamicsConfig(), make_dynamics),
        (ModelLossConfig(), PWMModelLoss),
        (ModelConfig(), WorldModelSpec),
        (AlgorithmConfig(), PWMActorLoss),
        (AlgorithmConfig(), Actor),
        (SizeConfig(), WorldModelSpec),
        (SizeConfig(), CriticEnsemble),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_defaults_are_the_constructors(section, made):
    function = made.__init__ if inspect.isclass(made) else made
    theirs = {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    ours = {name: value for name, value in vars(section).items() if name not in DEVIATES}
    shared = ours.keys() & theirs.keys()
    assert shared - {"dynamics"}
    for name in shared - {"dynamics"}:
        assert ours[name] == theirs[name], name


def test_every_key_has_one_rule_and_sections_know_their_key():
    for key, hint in schema_keys().items():
        if dataclasses.is_dataclass(hint):
            assert hint.key == f"{key}."  # type: ignore[union-attr]


def test_comments_explain_keys():
    comments = key_comments()
    assert comments.keys() <= schema_keys().keys()
    assert comments["training.eval_every"] == "epochs between evaluations; 0: only at the end"
    assert comments["model.dynamics.checkpoint_substeps"].endswith("None: the memory plan decides")  # of two lines


def test_sizes_are_those_of_the_files():
    found = sizes()
    assert set(found) == {"tiny", "5m", "19m", "48m", "317m"}
    assert (found["48m"].units, found["48m"].latent_dim, found["48m"].num_critics) == ([1792, 1792], 768, 3)
