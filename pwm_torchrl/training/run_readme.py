"""``README.md`` of a run directory: what the run is, what each of its files holds, and the commands that use them."""

from __future__ import annotations

import os
from pathlib import Path

from pwm_torchrl.commands import named, typed, what_next
from pwm_torchrl.config import Config
from pwm_torchrl.training.artifacts import swap_in

__all__ = ["write_run_readme"]


def write_run_readme(run_dir: str | os.PathLike[str], cfg: Config) -> Path:
    """Writes ``README.md``.

    Args:
        run_dir (path): the run's directory.
        cfg (Config): the run.

    Returns:
        Path: the file.
    """
    env = cfg.env.get("name") or cfg.env.get("_target_", "?")
    source = typed("report").startswith("python")
    lines = [
        f"# {env}, {cfg.model.name}, {cfg.size.name}, seed {cfg.seed}",
        "",
        f"A run of pwm_torchrl: {_subject(cfg, env)} (`model={cfg.model.name}`, `size={cfg.size.name}`, "
        f"`seed={cfg.seed}`, {cfg.training.epochs} epochs planned).",
        "How it ended: `summary.json`.",
        "",
        "| file | what it holds |",
        "|---|---|",
        *[f"| `{name}` | {what} |" for name, what in _files(cfg)],
        "",
        "## Use it",
        "",
        "From the root of the project, with this directory as RUN:" if source else "With this directory as RUN:",
        "",
        "```",
        *_commands(cfg),
        "```",
        "",
        "```python",
        *_code(cfg),
        "```",
        "",
    ]
    return swap_in(Path(run_dir) / "README.md", "\n".join(lines))


def _subject(cfg: Config, env: str) -> str:
    if cfg.mode == "pretrain":
        return f"a world model of **{env}**, trained on stored episodes"
    if cfg.mode == "extract":
        return f"a policy for **{env}**, trained by back-propagation through a world model of stored episodes"
    return f"a policy for **{env}**, trained by back-propagation through a learned world model"


def _commands(cfg: Config) -> list[str]:
    uses = [(f"{typed(script)} {words}", meaning) for script, words, meaning in what_next(cfg.mode)]
    lines = [f"{command:<38} # {meaning}" for command, meaning in uses]
    if cfg.logger.kind == "tensorboard":
        lines.append("tensorboard --logdir RUN/tensorboard")
    if cfg.logger.kind == "wandb":
        lines.append("wandb sync RUN/wandb/offline-run-*     # upload what was logged offline")
    return lines


def _code(cfg: Config) -> list[str]:
    if cfg.mode == "pretrain":
        return [
            "from pwm_torchrl.modules import read_world_model",
            "",
            'world_model, facts = read_world_model("RUN")  # facts: its tasks, dimensions and architecture',
        ]
    return [
        "import pwm_torchrl",
        "",
        'policy = pwm_torchrl.load_policy("RUN")            # TensorDictModule: observation -> action, no noise',
        'env = pwm_torchrl.load_env("RUN", num_envs=10)     # the environment, in whose units the policy acts',
        'world_model = pwm_torchrl.load_world_model("RUN")  # TensorDictModule of the world model',
    ]


def _files(cfg: Config) -> list[tuple[str, str]]:
    repeat = cfg.env.get("action_repeat", 1)
    online, policy = cfg.mode == "online", cfg.mode != "pretrain"
    measured = "returns, losses" if policy else "losses, errors on held-out episodes"
    counts = (
        f" `agent_steps` counts decisions of the policy, `env_steps` steps of the environment ({repeat} per decision)."
        if online
        else ""
    )
    files = [
        ("config.yaml", "the whole configuration; the same one in an unfinished directory resumes the run"),
        (
            "metrics.csv",
            f"one row per epoch: {measured}, gradient norms before clipping, speed.{counts} Empty cells were not "
            "measured in that epoch",
        ),
        (
            "summary.json",
            "the end result: status (running, finished, failed, stopped, memory: it ran out, storage: a disk is full "
            "or broken), returns, steps, peak memory",
        ),
        ("checkpoints/", "what resuming and loading need; readable with `weights_only=True`"),
    ]
    if not policy:
        files.append(("world_model/", "the world model that was best by validation: weights as safetensors, and JSON"))
    curves = "returns with their spread" if policy else "errors on held-out episodes"
    files.append(
        ("curves.png", f"{curves}, losses and gradient norms over {'environment steps' if online else 'epochs'}")
    )
    files.append(("memory_plan.txt", "what the run was predicted to need, why, what was chosen, and what was measured"))
    files.append(("memory_plan.json", "the same for programs"))
    if cfg.training.video and policy:
        files.append(("video.mp4", "one deterministic episode of the trained policy"))
    files.append(("events.jsonl", "what happened to the run, one JSON object per line: starts, resumes, faults, end"))
    files.append(("attempts/", "who trained here and how that ended, one number per attempt; the highest owns the run"))
    files.append(("log.txt", f"the job's output, where it was started by `{named('submit')}`"))
    files.append(("submitit/", "the same: files of the library that ran the job, one folder per attempt"))
    if cfg.training.replay_storage == "disk" and online:
        files.append(("replay/", "the replay buffer; checkpoints refer to it"))
    if cfg.logger.kind == "tensorboard":
        files.append(("tensorboard/", "the same metrics as TensorBoard events"))
    if cfg.logger.kind == "wandb":
        files.append(("wandb/", "W&B's own files; `wandb_id.txt` lets a resumed run continue the same curve there"))
    return files
