"""Headless rendering: choice of MuJoCo's OpenGL backend, and single frames."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from torchrl.envs import EnvBase

from pwm_torchrl.envs.info import env_layers
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

__all__ = ["draw_or_explain", "import_mujoco_library", "render_frame"]

_ADVICE = "install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa before starting"


def import_mujoco_library(module: str, extra: str) -> ModuleType:
    """Import a module that loads MuJoCo, with an OpenGL backend that needs no display.

    gymnasium reads ``MUJOCO_GL`` when it first draws, dm_control when it is imported. Where the user has not set it,
    EGL is chosen; where EGL does not start, the library is loaded without rendering, so that training does not need
    what only videos need.

    Args:
        module (str): what to import, for example ``"dm_control.suite"``.
        extra (str): extra of this package that installs it, for the message.

    Returns:
        ModuleType: the module.

    Raises:
        MissingLibraryError: if it is not installed.
    """
    chosen = "MUJOCO_GL" not in os.environ and sys.platform.startswith("linux")
    if chosen:
        os.environ["MUJOCO_GL"] = "egl"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingLibraryError(f"{error.name} is not installed: pip install 'pwm-torchrl[{extra}]'") from error
    except (ImportError, AttributeError):
        # EGL without a usable driver raises at import, ImportError or PyOpenGL's AttributeError.
        if not chosen:
            raise
        os.environ["MUJOCO_GL"] = "disabled"
        return importlib.import_module(module)


def render_frame(env: EnvBase) -> np.ndarray:
    """Picture of an environment's present state.

    Args:
        env (EnvBase): made with ``num_envs=1, render=True``.

    Returns:
        numpy.ndarray: uint8, ``[height, width, 3]``.

    Raises:
        ConfigurationError: if the environment cannot draw itself here.
    """
    for layer in env_layers(env):
        draw = getattr(type(layer), "render_frame", None)
        if draw is not None:
            return _as_picture(draw(layer))
    base = list(env_layers(env))[-1]
    try:  # an environment of the user's own: whatever TorchRL can reach under the usual name
        return _as_picture(base.render())
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ConfigurationError(f"{type(base).__name__} cannot be filmed: it has no render()") from error


def without_display() -> None:
    """Let SDL, which draws classic control, do without a display where there is none; keeps its complaints away."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def draw_or_explain(name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Call ``draw()`` and turn the ways in which a machine without graphics fails into one sentence."""
    without_display()
    try:
        return draw()
    except Exception as error:  # every OpenGL stack raises a type of its own
        _drop_half_made_viewer(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        detail = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{name} cannot be drawn here with MUJOCO_GL={backend} ({type(error).__name__}: {detail}): {_ADVICE}"
        ) from error


def _drop_half_made_viewer(error: Exception) -> None:
    """Delete what a failed renderer left, without its complaints: gymnasium's viewer frees a context it never had."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _as_picture(frame: Any) -> np.ndarray:
    while isinstance(frame, (list, tuple)):
        frame = frame[0]
    frame = np.asarray(frame)
    while frame.ndim > 3:
        frame = frame[0]
    if frame.ndim != 3:
        raise ConfigurationError(
            f"the environment rendered an array of shape {frame.shape} instead of [height, width, 3]: "
            "make it with render=True"
        )
    if frame.shape[0] == 3 and frame.shape[-1] != 3:  # TorchRL's channels-first pictures
        frame = frame.transpose(1, 2, 0)
    return np.ascontiguousarray(frame[..., :3].astype(np.uint8))
