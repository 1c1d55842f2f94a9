"""``pwm COMMAND``: how a command is found, named, and what it imports before its words are known to be right."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from pwm_torchrl import __version__
from pwm_torchrl.cli import entry
from pwm_torchrl.config import Config
from pwm_torchrl.run.directory import save_config

pytestmark = pytest.mark.usefixtures("workdir")

#: What takes seconds to import, or is of no use to words.
SLOW = {"torch", "tensordict", "torchrl", "matplotlib", "gymnasium", "mujoco", "dm_control", "wandb"}
UNUSED = {"numpy", "pandas", "scipy", "submitit", "rich"}
#: Command lines that are answered without any work, and the exit code.
ANSWERED = {
    **{f"{name} --help": 0 for name in entry.COMMANDS},
    **{f"data {name} --help": 0 for name in ("import", "inspect", "generate")},
    "submit modle=flow_v2": 2,
    "submit model=flwo_v2": 2,
    "submit seed=1,2 model.dynamics.substps=2": 2,
    "submit model=mlp model.dynamics.substeps=2": 2,
    "submit experiment=extract task=all model=flow_v2 pretraining.algorithm.slice_steps=no": 2,
    "submit --dryrunn": 2,
    "train training.epochs=many": 2,
    "train algorithm.gamma=2": 2,
    "train algorithm.lmbda=0.9": 2,
    "train algorithm.updates_per_step=9": 2,
    "train algorithm=pwm_paper algorithm.horizon=0": 2,
    "train algorithm=shac env=pendulum_torchrl algorithm.model_lr=1": 2,
    "train algorithm=shac env=pendulum_torchrl training.replay_capacity=9": 2,
    "train cluster=l40s": 2,
    "pretrain mode=online": 2,
    "plan --json": 2,
    "plan memory.margin=1": 2,
    "plan --cfg job": 0,
    "check_env env=halfchetah": 2,
    "doctor cluster=l40": 2,
    "doctor --force": 2,
    "evaluate nowhere": 2,
    "evaluate": 2,
    "data improt": 2,
    "world_model show": 2,
    "resume nowhere": 2,
}
#: Of those, the commands that take no settings, and need not even Hydra.
PLAIN = ("evaluate", "data", "world_model", "status", "report")


def loaded_by(words: list[str], code: int) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded when it has answered a command line."""
    program = (
        "import json, sys\n"
        "from pwm_torchrl.cli.entry import run_command\n"
        f"try:\n    code = run_command({words[0]!r}, {words[1:]!r})\n"
        "except SystemExit as end:\n    code = end.code or 0\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print()\n"
        "print(json.dumps([code, names]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ended, names = json.loads(done.stdout.splitlines()[-1])
    assert ended == code, done.stdout + done.stderr
    return set(names)


@pytest.mark.parametrize("line", ANSWERED)
def test_help_and_typos_import_nothing_slow(line):
    words = line.split()
    loaded = loaded_by(words, ANSWERED[line])
    assert not loaded & (SLOW | UNUSED)
    assert not (words[0] in PLAIN and loaded & {"hydra", "omegaconf"})


@pytest.fixture
def runs(workdir: Path) -> Path:
    """A folder with a run that has finished."""
    run = workdir / "runs" / "one"
    run.mkdir(parents=True)
    cfg = Config(env={"name": "pole", "_target_": "pole.make", "num_envs": 1})
    cfg.model.name, cfg.size.name = "mlp", "tiny"
    cfg.size.latent_dim, cfg.size.units, cfg.size.encoder_units = 8, [8], [8]
    save_config(cfg, run)
    (run / "summary.json").write_text(json.dumps({"status": "finished", "epochs_done": 1, "epochs_planned": 1}))
    return workdir / "runs"


@pytest.mark.parametrize("name", ["status", "resume"])
def test_looking_at_runs_imports_nothing_slow(runs, name):
    assert not loaded_by([name, str(runs)], 0) & (SLOW | UNUSED)


def test_a_report_needs_no_torch_and_draws_only_what_is_there(runs):
    loaded = loaded_by(["report", str(runs)], 0)
    assert not loaded & (SLOW - {"matplotlib"})


def test_every_stage_is_there():
    pytest.importorskip("submitit")
    for stages in [*(command.stages for command in entry.COMMANDS.values()), (entry.SHOW_CONFIG,)]:
        for stage in stages:
            module, _, name = stage.partition(":")
            assert callable(getattr(importlib.import_module(f"pwm_torchrl.cli.{module}"), name))


def typed(monkeypatch, *words: str) -> int:
    """The exit code of ``pwm`` and these words."""
    monkeypatch.setattr(sys, "argv", ["/venv/bin/pwm", *words])
    return entry.main()


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_each_is_named_as_it_is_typed(name, capsys, monkeypatch):
    written = name.replace("_", "-")
    for spelling in {name, written}:
        with contextlib.suppress(SystemExit):  # argparse ends so
            assert typed(monkeypatch, spelling, "--help") == 0
        out = capsys.readouterr().out
        assert f"usage: pwm {written}" in out
        assert "launch/" not in out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_commands_are_listed(words, capsys, monkeypatch):
    assert typed(monkeypatch, *words) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [name.replace("_", "-") for name in entry.COMMANDS]


def test_the_version(capsys, monkeypatch):
    assert typed(monkeypatch, "--version") == 0
    assert __version__ in capsys.readouterr().out


def test_a_command_that_there_is_not(capsys, monkeypatch):
    assert typed(monkeypatch, "chekc-env", "env=pendulum") == 2
    err = capsys.readouterr().err
    assert "pwm chekc-env" in err
    assert "did you mean check-env?" in err


def test_without_the_libraries_of_the_command_line(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("pwm_torchrl.cli.") and name not in (entry.__name__, "pwm_torchrl.cli.console"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert entry.run_command("train", []) == 2
    assert capsys.readouterr().err == "error: hydra is not installed; pip install 'pwm-torchrl[launch]'\n"


def test_other_missing_modules_are_bugs(monkeypatch):
    monkeypatch.setitem(entry.COMMANDS, "nothing", entry.Command("", ("nothing:read",)))
    with pytest.raises(ModuleNotFoundError):
        entry.run_command("nothing", [])
