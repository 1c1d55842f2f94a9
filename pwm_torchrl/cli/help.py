"""The ``--help`` texts of the commands that take settings, with the default values."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from pwm_torchrl.choices import default_choices, group_choices, key_comments, user_configs_dir
from pwm_torchrl.cli.command_line import OPTIONS, PRESET, with_preset
from pwm_torchrl.cli.compose import compose_unchecked
from pwm_torchrl.cli.derived_settings import describe_epoch
from pwm_torchrl.cli.validate import value_of
from pwm_torchrl.commands import named, typed

__all__ = ["doctor_help", "help_text"]

WIDTH = 80
_GLUE = "\u00a0"  # a non-breaking space

_ABOUT = {
    "submit": "Train policies in learned world models, as SLURM jobs if SLURM is found, else on this machine.",
    "train": "Train a policy in a learned world model, in this process.",
    "pretrain": "Train a world model on stored episodes of one or many tasks, in this process.",
    "plan": "Show how much memory and disk a run needs, why, and which settings make it fit; runs nothing.",
    "check_env": "Show an environment as training sees it: specs, scaling, termination, and which state can be saved.",
}
_GROUPS = {
    "model": "latent dynamics of the world model",
    "size": "widths of the networks",
    "env": "the environment",
    "experiment": "a preset of any of these settings",
    "algorithm": "the training algorithm: updates, batches, learning rates",
    "logger": "where metrics go besides metrics.csv",
    "cluster": "where the job runs: local, debug (in this process), or nodes of SLURM",
    "memory": "how the run is made to fit in memory",
}
#: Keys that are shown with their default, each with its own explanation; if that is empty, with the comment in the
#: schema. A key with ``=WORD`` has no default; the word stands for its value.
_KEYS = {
    "seed": "",
    "run_dir=PATH": "",
    "device": "",
    "training.epochs": "length of the run; {epoch}",
    "training.steps=N": "",
    "training.eval_every": "",
    "training.threads": "",
    "env.num_envs": "environments stepped together",
    "algorithm.horizon": "",
    "algorithm.model_batch": "",
    "model.dynamics.substeps": "",
    "model.reward_head": "",
    "data.path=STORE": "",
    "world_model=PATH": "",
}
#: Keys that a pre-training does not use.
_ONLINE = ("training.steps=N", "env.num_envs", "world_model=PATH")

_EXAMPLES = {
    "": "the default model on Pendulum-v1, two minutes",
    "model=mlp seed=1": "PWM's own dynamics, another seed",
    "env=halfcheetah size=5m training.steps=1e6": "a MuJoCo task",
    "env=dm_control env.domain=walker env.task=walk": "any dm_control task",
    "env._target_=my_pkg.make_env": "your own environment, nothing to edit",
    "experiment=dflex_ant_48m_flow_v2": "a preset: dflex Ant at 48M",
}
_MORE_EXAMPLES = {
    "plan": {
        "model=flow_v3 size=48m env=dflex_ant cluster=l40s": "for the nodes of a cluster profile",
        "size=48m memory.host_gib=16 --json plan.json": "within a budget; also as a file",
    },
    "submit": {
        "model=flow_v1,flow_v2 seed=1,2,3": "six runs; on SLURM one job array",
        "experiment=mt30 task=all data.path=STORE": "pre-train, then a policy per task",
        "cluster=l40s --dry-run": "what would be submitted",
    },
}
_PRETRAIN_EXAMPLES = {
    "data.path=STORE": "all tasks of a store",
    "tasks=mt30 model=flow_v2 size=48m data.path=STORE": "a published set of tasks",
    "tasks=cup-catch,walker-walk data.path=STORE": "some of them",
    "experiment=mt30_pretrain data.path=STORE": "a preset: MT30 at 48M",
}

_EXIT_CODES = (
    "Exit codes: 0 finished, 1 failed, 2 bad input, 74 storage (a disk is full or broken), 75 memory (it ran out), "
    "130 stopped. After 74, 75 and 130 the same command with run_dir=PATH continues from the last checkpoint."
)


def help_text(script: str) -> str:
    """The help of a command that takes a configuration; lines have at most 80 columns, except for paths."""
    run = typed(script)
    options = [f"{option} {what}".strip() for option, what in OPTIONS[script].items()]
    usage = ["GROUP=CHOICE ...", "GROUP.KEY=VALUE ...", *options, "--cfg job"]
    own = user_configs_dir() / "cluster" / "NAME.yaml"
    lines = [
        *_wrapped(_ABOUT[script]),
        "",
        *_wrapped(" ".join(f"[{each}]".replace(" ", _GLUE) for each in usage), f"usage: {run} "),
        "",
        "Groups:",
        *_groups(script),
        "",
        "cluster=NAME also selects a profile of your own,",
        f"  {own}",
        *_wrapped(f"{typed('doctor')} --draft NAME drafts one from SLURM's data."),
        "",
        "Common keys and their defaults:",
        *_keys(script),
        *_wrapped("--cfg job prints all keys; pwm_torchrl/config.py explains them."),
        "",
        "Examples:",
    ]
    examples = _PRETRAIN_EXAMPLES if script == "pretrain" else {**_EXAMPLES, **_MORE_EXAMPLES.get(script, {})}
    for words, meaning in examples.items():
        lines += [f"  # {meaning}", f"  {run} {words}".rstrip()]
    if script in ("submit", "train", "pretrain"):
        lines += ["", *_wrapped(_EXIT_CODES)]
    return "\n".join(lines)


def _groups(script: str) -> list[str]:
    defaults = default_choices()
    if script in PRESET:
        defaults["experiment"] = PRESET[script]
    lines = []
    for group, choices in group_choices().items():
        default = f" (default {defaults[group]})" if group in defaults else ""
        lines += _wrapped(f"{_GROUPS.get(group, '')}{default}", f"  {group:<11} ")
        lines += _wrapped(", ".join(choices), " " * 14)
    return lines


def _keys(script: str) -> list[str]:
    config = compose_unchecked(with_preset(script, []))
    keys = {key: meaning for key, meaning in _KEYS.items() if script != "pretrain" or key not in _ONLINE}
    words = {key: key if "=" in key else f"{key}={_shown(value_of(config, key))}" for key in keys}
    column = max(map(len, words.values())) + 2
    lines, comments = [], key_comments()
    for key, meaning in keys.items():
        text = meaning.format(epoch=describe_epoch(config)) or comments[key.partition("=")[0]].replace("None", "null")
        text = re.sub(r"launch/(\w+)\.py", lambda script: named(script[1]), text)  # ``pwm NAME`` if it is installed
        lines += _wrapped(text, f"  {words[key]:<{column}}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, head: str = "") -> list[str]:
    rest = " " * len(head)
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_GLUE, " ") for line in lines]


def doctor_help() -> str:
    """The help of ``doctor``."""
    doctor = typed("doctor")
    return f"""\
Check this machine for training: GPU, rendering, disk, SLURM and the cluster profile, W&B; or draft a profile.

usage: {doctor} [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...]
       {doctor} --draft NAME [cluster.partition=PARTITION] [--force]

A line per check: ok, warning (works, less well) or problem (does not), and what to do.
The draft is written to
  {user_configs_dir() / "cluster" / "NAME.yaml"}
and is used by cluster=NAME. An existing file is overwritten only with --force.

Examples:
  {doctor:<54} # this machine
  {doctor + " cluster=l40s logger=wandb":<54} # does the profile fit SLURM, would W&B work
  {doctor + " runs_dir=/scratch/me/runs":<54} # is that a good place for runs
  {doctor} --draft my_cluster cluster.partition=gpu

Exit codes: 0 no problem, 1 a problem, 2 bad input."""
