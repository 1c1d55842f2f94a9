"""Options, settings, and Hydra's words: each works or is answered with what to type instead."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("hydra")

import yaml
from refusals import assert_refused

from pwm_torchrl.algorithm.pwm import PWM
from pwm_torchrl.algorithm.pwm_paper import PaperPWM
from pwm_torchrl.algorithm.shac import SHAC
from pwm_torchrl.choices import schema_choices, schema_keys
from pwm_torchrl.cli import prepare
from pwm_torchrl.cli.command_line import ANY, OPTIONS, USAGE_RULES, parse_command_line
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.run_requests import ComposedRun
from pwm_torchrl.cli.sweeps import expand
from pwm_torchrl.config import DynamicsConfig
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics.factory import CLASSES, COMMON, KINDS, PARAMETERIZATIONS, make_dynamics, options_of

COMMANDS = ("submit", "train", "pretrain", "plan", "check_env", "doctor")
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.mark.parametrize("words", [["--help"], ["model=no", "-h"], ["--json", "--help"], ["help"], ["-x", "--help"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_in_any_position(name, words, capsys):
    assert run_command(name, words) == 0
    assert f"usage: python launch/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["--tasks", "mt30", "-h"], ["store", "--help"]])
def test_help_of_data(words, capsys):
    assert run_command("data", words) == 0
    assert "usage: python launch/data.py" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["--dry-run", "--dry_run", "--dryrun", "--Dry-Run", "--DRYRUN"])
def test_a_dry_run_however_it_is_written(written):
    line = parse_command_line("submit", ["seed=1", written, "model=mlp"])
    assert line.options == {"--dry-run": ""}
    assert line.settings == ["seed=1", "model=mlp"]


@pytest.mark.parametrize("words", [["--json", "a.json"], ["--json=a.json"], ["--JSON", "a.json"]])
def test_options_with_a_value(words):
    line = parse_command_line("plan", ["model=mlp", *words, "seed=1"])
    assert line.options == {"--json": "a.json"}
    assert line.settings == ["model=mlp", "seed=1"]


@pytest.mark.parametrize("word", ["-m", "--multirun"])
def test_multirun_is_what_submit_does_anyway(word):
    assert parse_command_line("submit", [word, "seed=1,2"]).settings == ["seed=1,2"]


@pytest.mark.parametrize(
    ("script", "words", "parts"),
    [
        ("train", ["-m", "seed=1,2"], ["-m", "python launch/submit.py KEY=A,B,C"]),
        ("train", ["--dry_run"], ["--dry_run", "python launch/submit.py: --dry-run"]),
        ("submit", ["--json", "x"], ["--json", "python launch/plan.py: --json FILE"]),
        ("submit", ["--dry-rum"], ["--dry-rum", "nearest: --dry-run", "launch/submit.py"]),
        ("submit", ["--dry-run=yes"], ["--dry-run=yes", "takes no value"]),
        ("train", ["--model=mlp"], ["--model=mlp", "without dashes: model=mlp"]),
        ("train", ["--run-dir", "x"], ["--run-dir", "without dashes: run_dir=x"]),
        ("train", ["--seed"], ["--seed", "seed=VALUE"]),
        ("train", ["--training.epochs=3"], ["without dashes: training.epochs=3"]),
        ("train", ["-z"], ["unknown option -z", "--help"]),
        ("plan", ["--json"], ["--json needs the name of a file"]),
        ("doctor", ["--draft"], ["--draft needs a name"]),
        ("train", ["--cfg"], ["--cfg", "--cfg job"]),
        ("train", ["--cfg", "hydra"], ["--cfg hydra", "--cfg job"]),
        ("train", ["-c", "all"], ["--cfg all", "--cfg job"]),
        ("train", ["--resolve"], ["--resolve", "--cfg job"]),
        ("train", ["--config-name", "x"], ["--config-name", "experiment=NAME"]),
        ("train", ["-cn=x"], ["-cn=x", "experiment=NAME"]),
        ("train", ["--config-dir=x"], ["--config-dir=x", "PWM_TORCHRL_CONFIG_DIR"]),
        ("train", ["--config-path", "x"], ["--config-path", "PWM_TORCHRL_CONFIG_DIR"]),
        ("train", ["--info"], ["--info", "--cfg job", "--help"]),
        ("train", ["--run"], ["--run", "leave it out"]),
        ("train", ["--package", "x"], ["--package", "--cfg job"]),
        ("train", ["--hydra-help"], ["--hydra-help", "--help"]),
        ("train", ["--shell-completion"], ["--shell-completion", "--help"]),
        ("train", ["--experimental-rerun", "x"], ["python launch/resume.py RUN"]),
        ("train", ["--version"], ["--version", "pwm_torchrl.__version__"]),
    ],
)  # fmt: skip
def test_other_options_are_answered(script, words, parts, capsys):
    assert run_command(script, words) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("hydra.run.dir=x", ["run_dir=PATH", "runs_dir=PATH"]),
        ("hydra.sweep.dir=x", ["runs_dir=PATH"]),
        ("hydra/launcher=submitit_slurm", ["cluster=NAME"]),
        ("hydra.launcher.partition=gpu", ["cluster.partition=gpu"]),
        ("hydra/sweeper=optuna", ["KEY=A,B,C"]),
        ("hydra.searchpath=[x]", ["PWM_TORCHRL_CONFIG_DIR"]),
        ("hydra.verbose=true", ["--help", "--cfg job"]),
        ("+hydra.job.chdir=false", ["run_dir=PATH"]),
        ("~hydra.job", ["--cfg job"]),
        ("model@other=mlp", ["@other", "write model=mlp"]),
        ("+seed=3", ["write seed=3"]),
        ("+model=mlp", ["write model=mlp"]),
        ("~seed", ["~seed", "set a value"]),
        ("~model", ["write model=CHOICE", "flow_v2"]),
        ("seed=${hydra:job.num}", ["${hydra:", "${seed}"]),
        ("dry_run=true", ["unknown key 'dry_run'", "python launch/submit.py --dry-run"]),
        ("dryrun=1", ["python launch/submit.py --dry-run"]),
        ("cfg=job", ["--cfg job"]),
    ],
)
def test_other_words_are_answered(word, parts):
    assert_refused([word], parts)


def test_words_that_work():
    config = compose(["++seed=3", "+env.g=9.0", "~experiment", "algorithm.collect_steps=${algorithm.horizon}"])
    assert (config.seed, config.env["g"], config.algorithm.collect_steps) == (3, 9.0, 3)
    assert "episode_length" not in compose(["~env.episode_length"]).env


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "pretrain"])
@pytest.mark.parametrize("words", [["--cfg", "job"], ["--cfg=job"], ["-c", "job", "--resolve"]])
def test_the_composed_configuration(name, words, capsys):
    assert run_command(name, ["model=mlp", *words, "algorithm.collect_steps=${seed}", "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["name"], shown["seed"], shown["algorithm"]["collect_steps"]) == ("mlp", 5, 5)
    assert list(Path().iterdir()) == []


def test_the_composed_configuration_of_the_first_of_several(capsys):
    assert run_command("submit", ["--cfg", "job", "seed=4,5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# the first of 2 runs: seed=4\n")
    assert yaml.safe_load(out)["seed"] == 4


def test_every_option_of_hydra_is_known_here():
    """What a later version of Hydra adds is answered too."""
    from hydra._internal.utils import get_args_parser

    for action in get_args_parser()._actions:
        for option in action.option_strings:
            if option in ("-h", "--help", "-c", "--cfg", "-m", "--multirun", "--resolve"):
                continue
            with pytest.raises(ConfigurationError, match="which belongs to Hydra; "):
                parse_command_line("train", [option])


def test_the_page_on_hydra_names_every_option():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "hydra.md").read_text()
    words = [
        "--help",
        "--cfg job",
        "--multirun",
        "--config-name",
        "--config-dir",
        "--info",
        "@",
        "range(",
        "choice(",
        "glob(",
    ]
    words += [
        "~",
        "hydra.run",
        "hydra/launcher",
        "${",
        "+env.",
        *(option for each in OPTIONS.values() for option in each),
    ]
    for word in words:
        assert word in page, word


def test_the_sweeps_of_the_page_work():
    assert len(expand(["seed=range(3)", "model=choice(mlp,flow_v1)"])) == 6


# Keys that are not used beside what is chosen -------------------------------------------------------------------------


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
    assert_refused(words, parts)


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
