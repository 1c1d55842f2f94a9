"""Options, settings, and Hydra's words: each works or is answered with what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hydra")

import yaml

from pwm_torchrl.cli.command_line import OPTIONS, parse_command_line
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cli.sweeps import expand
from pwm_torchrl.errors import ConfigurationError

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
    with pytest.raises(ConfigurationError) as caught:
        compose([word])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


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
