"""The text behind ``--help``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pwm_torchrl.commands import named, typed
from pwm_torchrl.launch.groups import group_choices, user_configs_dir

__all__ = ["help_text", "wants_help"]

_GROUPS = {
    "model": "latent dynamics of the world model",
    "size": "widths of the networks",
    "env": "what is learned",
    "experiment": "a preset of everything",
    "algorithm": "horizon, batches, learning rates",
    "logger": "where metrics go besides metrics.csv",
    "cluster": "where the job runs: local, debug (in this process), or nodes of SLURM",
    "memory": "how the run is made to fit in memory",
}
_DEFAULTS = {
    "model": "flow_v2",
    "size": "tiny",
    "env": "pendulum",
    "algorithm": "pwm",
    "logger": "csv",
    "cluster": "auto",
    "memory": "auto",
}
_KEYS = {
    "seed=0": "one seed determines a run on the CPU",
    "run_dir=PATH": "this run's directory; an unfinished run of the same settings is resumed",
    "device=auto": "auto, cpu, cuda or cuda:N",
    "training.epochs=500": "length of the run",
    "training.eval_every=50": "epochs between evaluations",
    "training.threads=2": "torch threads",
    "env.num_envs=8": "environments stepped together",
    "algorithm.horizon=16": "steps imagined, and length of the model's training slices",
    "algorithm.model_batch=256": "slices per world-model update",
    "model.dynamics.substeps=4": "K, solver substeps of a flow",
    "model.reward_head=two_hot": "scalar or two_hot",
    "data.path=STORE": "stored episodes ({data} import), for pre-training and extraction",
    "world_model=PATH": "pre-trained world model, for extraction (experiment=extract task=NAME or all)",
}
_ABOUT = {
    "submit": "Train policies in learned world models, as jobs: of SLURM where it is found, else here.",
    "train": "Train a policy in a learned world model, in this process.",
    "pretrain": "Train a world model on stored episodes of one or many tasks, in this process.",
    "plan": "Say what a run will need of memory and disk, why, and what is chosen so that it fits; runs nothing.",
    "check_env": "Say what training would see of an environment: specs, scaling, termination, what can be saved.",
}


_EXIT_CODES = (
    "Exit codes: 0 finished, 1 failed, 2 bad input, 74 storage (a disk is full or broken), 75 memory (it ran out),",
    "130 stopped. After 74, 75 and 130 the same command with run_dir=PATH goes on from the last checkpoint.",
)

_OPTIONS = {"plan": " [--json FILE]", "submit": " [--dry-run]"}


def wants_help(words: Sequence[str]) -> bool:
    """Whether the user asks for help instead of a run."""
    return any(w in ("-h", "--help", "help") for w in words)


def help_text(script: str) -> str:
    """The help of an entry point that takes a configuration."""
    run = typed(script)
    lines = [
        _ABOUT[script],
        "",
        f"usage: {run} [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...]{_OPTIONS.get(script, '')}",
        "",
        "Groups:",
    ]
    for group, choices in group_choices().items():
        default = f" (default {_DEFAULTS[group]})" if group in _DEFAULTS else ""
        lines.append(f"  {group:<11} {_GROUPS.get(group, '')}{default}")
        lines += textwrap.wrap(", ".join(choices), 96, initial_indent=" " * 14, subsequent_indent=" " * 14)
    own = str(user_configs_dir() / "cluster" / "NAME.yaml")
    lines += [
        "",
        "cluster=NAME is also the file",
        f"  {own}",
        f"of your own; {typed('doctor')} --draft NAME drafts it from what SLURM says.",
        "",
        "Common keys (all of them, with types and defaults: pwm_torchrl/config.py):",
    ]
    lines += [f"  {key:<28} {meaning.format(data=named('data'))}" for key, meaning in _KEYS.items()]
    examples = {
        "": "Flow V2 on Pendulum-v1, a few minutes",
        "model=mlp seed=1": "PWM's own dynamics, another seed",
        "env=halfcheetah size=5m training.epochs=2000": "a MuJoCo task",
        "env=dm_control env.domain=walker env.task=walk": "any dm_control task",
        "env._target_=my_pkg.make_env": "your own environment, nothing to edit",
        "experiment=dflex_ant_48m_flow_v2": "a preset: dflex Ant at 48M",
    }
    if script == "pretrain":
        examples = {
            "data.path=STORE": "all tasks of a store",
            "tasks=mt30 model=flow_v2 size=48m data.path=STORE": "a published set of tasks",
            "tasks=cup-catch,walker-walk data.path=STORE": "some of them",
            "experiment=mt30_pretrain data.path=STORE": "a preset: MT30 at 48M",
        }
    if script == "plan":
        examples["model=flow_v3 size=48m env=dflex_ant cluster=l40s"] = "for nodes elsewhere"
        examples["size=48m memory.host_gb=16 --json plan.json"] = "within a budget; also as a file"
    if script == "submit":
        examples["model=flow_v1,flow_v2 seed=1,2,3"] = "six runs; on SLURM one job array"
        examples["experiment=mt30 task=all data.path=STORE"] = "pre-train, then a policy per task"
        examples["cluster=l40s --dry-run"] = "what would be submitted"
    lines += ["", "Examples:"]
    lines += [f"  {f'{run} {words}'.strip():<76} # {meaning}" for words, meaning in examples.items()]
    if script in ("submit", "train", "pretrain"):
        lines += ["", *_EXIT_CODES]
    return "\n".join(lines)
