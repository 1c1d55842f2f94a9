"""What a run leaves behind for people: ``summary.json``, ``curves.png``, ``video.mp4`` and a README.

Every file is written beside its final name and swapped in, so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwm_torchrl.errors import MissingLibraryError
from pwm_torchrl.training.curves import write_curves

__all__ = ["json_text", "swap_in", "write_curves", "write_summary", "write_video"]

Frame = npt.NDArray[np.uint8]


def write_summary(run_dir: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Writes ``summary.json`` in one step.

    Numbers that JSON does not know (NaN, infinities) become ``null``.

    Returns:
        The file's path.

    Raises:
        TypeError: if a value is not plain data; a tensor has no place in a summary.
    """
    return swap_in(Path(run_dir) / "summary.json", json_text(dict(summary)))


def json_text(content: Any) -> str:
    """Plain data as JSON with a newline at the end; NaN and infinities, which JSON does not have, become ``null``."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def write_video(file: str | os.PathLike[str], frames: Iterable[Frame], fps: float = 30.0) -> Path:
    """Writes an mp4 (H.264) from pictures.

    Args:
        file: where to write, ``RUN/video.mp4`` for example.
        frames: uint8 arrays ``[height, width, 3]``, all of one shape; a generator keeps only one in memory.
            An odd height or width, which the format does not allow, is padded by repeating the last row or column.
        fps: pictures per second, > 0. Defaults to ``30.0``.

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
    partial = target.with_suffix(".tmp.mp4")
    height, width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    writer = write_frames(
        str(partial),
        (width, height),
        fps=fps,
        codec="libx264",
        quality=7,
        macro_block_size=2,
        ffmpeg_log_level="error",
        ffmpeg_timeout=0,
    )
    writer.send(None)
    try:
        for index, frame in enumerate(chain([first], frames)):
            writer.send(_even(_checked(frame, shape, index)).tobytes())
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    os.replace(partial, target)
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


def swap_in(target: Path, text: str) -> Path:
    """Writes a file in one step."""
    partial = target.with_name(target.name + ".tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
