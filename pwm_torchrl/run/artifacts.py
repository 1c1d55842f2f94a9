"""Files that a run writes for people and other programs: README.md, summary.json and video.mp4."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.commands import named, typed, what_next
from pwm_torchrl.config import Config
from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.files import replacing, write_durably

__all__ = ["json_text", "write_atomically", "write_run_readme", "write_summary", "write_video"]


def write_run_readme(run_dir: str | os.PathLike[str], cfg: Config, has_model: bool = True) -> Path:
    """Writes ``README.md``.

    Args:
        run_dir (path): the run's directory.
        cfg (Config): the run.
        has_model (bool): whether it has a world model. Defaults to ``True``.

    Returns:
        Path: the file.
    """
    env = cfg.env.get("name") or cfg.env.get("_target_", "?")
    source = typed("report").startswith("python")
    lines = [
        f"# {env}, {cfg.model.name}, {cfg.size.name}, seed {cfg.seed}",
        "",
        f"A run of pwm_torchrl: {_subject(cfg, env, has_model)} (`algorithm={cfg.algorithm.name}`, "
        f"`model={cfg.model.name}`, `size={cfg.size.name}`, "
        f"`seed={cfg.seed}`, {cfg.training.epochs} epochs planned).",
        "Its result: `summary.json`.",
        "",
        "| file | content |",
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
        *_code(cfg, has_model),
        "```",
        "",
    ]
    return write_atomically(Path(run_dir) / "README.md", "\n".join(lines))


def _subject(cfg: Config, env: str, has_model: bool) -> str:
    if cfg.mode == "pretrain":
        return f"a world model of **{env}**, trained on stored episodes"
    if cfg.mode == "extract":
        return f"a policy for **{env}**, trained by back-propagation through a world model of stored episodes"
    if not has_model:
        return f"a policy for **{env}**, trained by back-propagation through that environment"
    return f"a policy for **{env}**, trained by back-propagation through a learned world model"


def _commands(cfg: Config) -> list[str]:
    uses = [(f"{typed(script)} {words}", meaning) for script, words, meaning in what_next(cfg.mode)]
    lines = [f"{command:<38} # {meaning}" for command, meaning in uses]
    loggers = (cfg.logger.kind, *cfg.logger.also)
    if "tensorboard" in loggers:
        lines.append("tensorboard --logdir RUN/tensorboard")
    if "wandb" in loggers:
        lines.append("wandb sync RUN/wandb/offline-run-*     # upload offline logs")
    return lines


def _code(cfg: Config, has_model: bool) -> list[str]:
    if cfg.mode == "pretrain":
        return [
            "from pwm_torchrl.modules import read_world_model",
            "",
            'world_model, facts = read_world_model("RUN")  # facts: its tasks, dimensions and architecture',
        ]
    code = [
        "import pwm_torchrl",
        "",
        'policy = pwm_torchrl.load_policy("RUN")            # TensorDictModule: observation -> action, no noise',
        'env = pwm_torchrl.load_env("RUN", num_envs=10)     # the environment, in whose units the policy acts',
    ]
    if has_model:
        code.append('world_model = pwm_torchrl.load_world_model("RUN")  # TensorDictModule of the world model')
    return code


def _files(cfg: Config) -> list[tuple[str, str]]:
    repeat, loggers = cfg.env.get("action_repeat", 1), (cfg.logger.kind, *cfg.logger.also)
    online, policy = cfg.mode == "online", cfg.mode != "pretrain"
    measured = "returns, losses" if policy else "losses, errors on held-out episodes"
    counts = (
        f" `agent_steps` counts decisions of the policy, `env_steps` steps of the environment ({repeat} per decision)."
        if online
        else ""
    )
    files = [
        (
            "config.yaml",
            "the whole configuration; a command with the same settings and this run_dir resumes an unfinished run",
        ),
        (
            "metrics.csv",
            f"one row per epoch: {measured}, gradient norms before clipping, speed.{counts} Empty cells were not "
            "measured in that epoch",
        ),
        (
            "summary.json",
            "the end result: status (running, finished, failed, stopped, memory: ran out of memory, storage: a disk "
            "is full or broken), returns, steps, peak memory",
        ),
        ("checkpoints/", "the state for resuming and loading; readable with `weights_only=True`"),
    ]
    if not policy:
        files.append(("world_model/", "the world model that was best by validation: weights as safetensors, and JSON"))
    curves = "returns with their spread" if policy else "errors on held-out episodes"
    files.append(
        ("curves.png", f"{curves}, losses and gradient norms over {'environment steps' if online else 'epochs'}")
    )
    files.append(("memory_plan.txt", "predicted memory with its reasons, the chosen settings, and the measured memory"))
    files.append(("memory_plan.json", "the same as JSON"))
    files.append(("compile.json", "whether its updates are compiled"))
    if cfg.training.profile:
        files.append(("trace.json.gz", "profile of some updates; open it in https://ui.perfetto.dev"))
    if cfg.training.video and policy:
        files.append(("video.mp4", "one deterministic episode of the trained policy"))
    files.append(("events.jsonl", "starts, resumes, faults and end of the run, one JSON object per line"))
    files.append(
        ("attempts/", "the process and the outcome of each attempt; the one with the highest number owns the run")
    )
    files.append(("log.txt", f"the job's output, if it was started by `{named('submit')}`"))
    files.append(("submitit/", "files of submitit, which ran the job, one folder per attempt"))
    if cfg.training.replay_storage == "disk" and online:
        files.append(("replay/", "the replay buffer; checkpoints refer to it"))
    if "tensorboard" in loggers:
        files.append(("tensorboard/", "the same metrics as TensorBoard events, and the video"))
    if "wandb" in loggers:
        files.append(("wandb/", "W&B's own files; `wandb_id.txt` lets a resumed run continue the same curve there"))
    return files


Frame = npt.NDArray[np.uint8]


def write_summary(run_dir: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Writes ``summary.json`` atomically.

    NaN and infinities, which JSON does not have, become ``null``.

    Returns:
        The file's path.

    Raises:
        TypeError: if a value is not plain data, for example a tensor.
    """
    return write_atomically(Path(run_dir) / "summary.json", json_text(dict(summary)))


def json_text(content: Any) -> str:
    """Plain data as JSON with a newline at the end; NaN and infinities, which JSON does not have, become ``null``."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def write_video(file: str | os.PathLike[str], frames: Iterable[Frame], fps: float = 30.0) -> Path:
    """Writes an mp4 (H.264) from frames.

    Args:
        file: the file to write, for example ``RUN/video.mp4``.
        frames: uint8 arrays ``[height, width, 3]``, all of one shape; with a generator, only one is in memory.
            An odd height or width, which the format does not allow, is padded by repeating the last row or column.
        fps: frames per second, > 0. Defaults to ``30.0``.

    Returns:
        The video's path.

    Raises:
        MissingLibraryError: if imageio-ffmpeg is not installed.
        ValueError: if there are no frames, or one has another shape or type.
    """
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise MissingLibraryError("a video needs imageio-ffmpeg: pip install 'pwm-torchrl[video]'") from error
    if not fps > 0:
        raise ValueError(f"fps={fps} is not a positive number of pictures per second")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs at least one frame")
    shape = np.shape(first)
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"a frame has shape {shape}; uint8 [height, width, 3] is needed")

    target = Path(file)
    height, width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    with replacing(target, suffix=".mp4") as draft:  # ffmpeg chooses the format by the suffix
        writer = write_frames(
            str(draft),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=7,
            macro_block_size=2,
            ffmpeg_log_level="error",
            ffmpeg_timeout=0,
        )
        with contextlib.closing(writer):
            writer.send(None)
            for index, frame in enumerate(chain([first], frames)):
                writer.send(_even(_checked(frame, shape, index)).tobytes())
    return target


def _checked(frame: Frame, shape: tuple[int, ...], index: int) -> Frame:
    frame = np.asarray(frame)
    if frame.shape != shape or frame.dtype != np.uint8:
        raise ValueError(f"frame {index} is {frame.dtype} {frame.shape}; uint8 {shape} is needed like the first")
    return frame


def _even(frame: Frame) -> Frame:
    rows, columns = frame.shape[0] % 2, frame.shape[1] % 2
    if rows or columns:
        frame = np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return np.ascontiguousarray(frame)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_atomically(target: Path, text: str) -> Path:
    """Writes a file atomically and flushes it to disk; returns its path."""
    write_durably(target, text)
    return target
