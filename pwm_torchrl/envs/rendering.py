"""Rendering without a display: choice of MuJoCo's OpenGL backend, and single frames."""

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

from pwm_torchrl.envs.standard import env_layers
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

__all__ = ["draw_or_explain", "import_mujoco_library", "render_frame"]

_ADVICE = "install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa before starting"


def import_mujoco_library(module: str, extra: str, wanted: str = "this environment") -> ModuleType:
    """Import a module that loads MuJoCo, with an OpenGL backend that needs no display.

    gymnasium reads ``MUJOCO_GL`` at the first frame, dm_control at import. If the user has not set it, EGL is chosen.
    If EGL does not work, the library is loaded without rendering, because training does not need it.

    Args:
        module (str): module to import, for example ``"dm_control.suite"``.
        extra (str): extra of this package that installs it, for the error message.
        wanted (str): setting that needs it, for the error message, such as ``"env.domain=walker"``. Defaults to
            ``"this environment"``.

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
        raise MissingLibraryError(
            f"{wanted} needs {error.name}, which is not installed: pip install 'pwm-torchrl[{extra}]'"
        ) from error
    except (ImportError, AttributeError):
        # Without a usable driver, EGL raises ImportError or PyOpenGL's AttributeError at import.
        if not chosen:
            raise
        os.environ["MUJOCO_GL"] = "disabled"
        return importlib.import_module(module)


def render_frame(env: EnvBase) -> np.ndarray:
    """Render an environment's current state.

    Args:
        env (EnvBase): an environment made with ``num_envs=1, render=True``.

    Returns:
        numpy.ndarray: uint8, ``[height, width, 3]``.

    Raises:
        ConfigurationError: if the environment cannot be rendered on this machine.
    """
    for layer in env_layers(env):
        draw = getattr(type(layer), "render_frame", None)
        if draw is not None:
            return _as_picture(draw(layer))
    base = list(env_layers(env))[-1]
    try:  # a user's own environment, by the usual method
        return _as_picture(base.render())
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ConfigurationError(f"{type(base).__name__} cannot be rendered: it has no render()") from error


def without_display() -> None:
    """Select SDL's dummy driver if there is no display; SDL renders classic control and would print warnings."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def draw_or_explain(name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Call ``draw()``, and convert the errors of a machine without graphics to a ConfigurationError."""
    without_display()
    try:
        return draw()
    except Exception as error:  # each OpenGL library raises its own exception types
        _drop_half_made_viewer(error)
        backend = os.environ.get("MUJOCO_GL", "unset")
        detail = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{name} cannot be rendered here with MUJOCO_GL={backend} ({type(error).__name__}: {detail}): {_ADVICE}"
        ) from error


def _drop_half_made_viewer(error: Exception) -> None:
    """Delete a failed renderer without its error output: gymnasium's viewer frees a context that does not exist."""
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
