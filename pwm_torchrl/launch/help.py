"""The text behind ``--help``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pwm_torchrl.launch.groups import group_choices

__all__ = ["help_text", "wants_help"]

_GROUPS = {
    "model": "latent dynamics of the world model",
    "size": "widths of the networks",
    "env": "what is learned",
    "experiment": "a preset of everything",
    "algorithm": "horizon, batches, learning rates",
    "logger": "where metrics go besides metrics.csv",
    "cluster": "where the job runs",
    "memory": "how updates are split to fit in memory",
}
_DEFAULTS = {
    "model": "flow_v2",
    "size": "tiny",
    "env": "pendulum",
    "algorithm": "pwm",
    "logger": "csv",
    "cluster": "local",
    "memory": "fixed",
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
}
_ABOUT = {
    "submit.py": "Train a policy in a learned world model, as a job of its own; its progress is shown here.",
    "train.py": "Train a policy in a learned world model, in this process.",
    "check_env.py": "Say what training would see of an environment: specs, scaling, termination, what can be saved.",
}


def wants_help(words: Sequence[str]) -> bool:
    """Whether the user asks for help instead of a run."""
    return any(w in ("-h", "--help", "help") for w in words)


def help_text(script: str) -> str:
    """The help of an entry point that takes a configuration."""
    run = f"python launch/{script}"
    lines = [
        _ABOUT[script],
        "",
        f"usage: {run} [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...]",
        "",
        "Groups:",
    ]
    for group, choices in group_choices().items():
        default = f" (default {_DEFAULTS[group]})" if group in _DEFAULTS else ""
        lines.append(f"  {group:<11} {_GROUPS.get(group, '')}{default}")
        lines += textwrap.wrap(", ".join(choices), 96, initial_indent=" " * 14, subsequent_indent=" " * 14)
    lines += [
        "",
        "Common keys (all of them, with types and defaults: pwm_torchrl/training/config.py):",
    ]
    lines += [f"  {key:<28} {meaning}" for key, meaning in _KEYS.items()]
    examples = {
        "": "Flow V2 on Pendulum-v1, a few minutes",
        "model=mlp seed=1": "PWM's own dynamics, another seed",
        "env=halfcheetah size=5m training.epochs=2000": "a MuJoCo task",
        "env=dm_control env.domain=walker env.task=walk": "any dm_control task",
        "env._target_=my_pkg.make_env": "your own environment, nothing to edit",
        "experiment=dflex_ant_48m_flow_v2": "a preset: dflex Ant at 48M",
    }
    lines += ["", "Examples:"]
    lines += [f"  {f'{run} {words}'.strip():<76} # {meaning}" for words, meaning in examples.items()]
    return "\n".join(lines)
