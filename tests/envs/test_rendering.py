"""Pictures without a display."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pwm_torchrl.envs import make_env, render_frame
from pwm_torchrl.envs.rendering import draw_or_explain
from pwm_torchrl.errors import ConfigurationError

GYM, DM = "pwm_torchrl.envs.make_gymnasium_env", "pwm_torchrl.envs.make_dm_control_env"


@pytest.mark.parametrize(
    "cfg",
    [
        {"_target_": GYM, "id": "Pendulum-v1"},
        {"_target_": GYM, "id": "HalfCheetah-v5"},
        {"_target_": DM, "domain": "cartpole", "task": "swingup"},
        {"_target_": "torchrl.envs.GymEnv", "env_name": "Pendulum-v1", "render_mode": "rgb_array"},
    ],
    ids=["classic", "mujoco", "dm_control", "foreign"],
)
def test_frame(cfg):
    env = make_env(cfg, num_envs=1, seed=0, render=True)
    env.rollout(3)
    try:
        frame = render_frame(env)
    except ConfigurationError as error:
        if "MUJOCO_GL" in str(error):
            pytest.skip(str(error))
        raise
    finally:
        env.close()
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    assert frame.std() > 1


def test_metaworlds_picture_stands_upright():
    """Its best camera is mounted upside down."""
    pytest.importorskip("metaworld")
    env = make_env({"_target_": "pwm_torchrl.envs.tasks.make_metaworld_env", "task": "reach"}, num_envs=1, seed=0,
                   render=True)  # fmt: skip
    env.reset()
    simulator = env._env.envs[0].simulator
    try:
        picture = render_frame(env)
    except ConfigurationError as error:
        pytest.skip(str(error))
    up = simulator.data.camera("corner2").xmat.reshape(3, 3)[2, 1]
    assert up < 0
    assert np.array_equal(picture, simulator.render()[::-1, ::-1])
    env.close()


def test_environment_made_without_render_says_so():
    env = make_env({"_target_": GYM, "id": "Pendulum-v1"}, num_envs=1, seed=0)
    env.reset()
    with pytest.raises(ConfigurationError, match="made without render=True"):
        render_frame(env)


def test_machine_without_graphics_trains_but_explains():
    """With no EGL driver an environment still steps, and only a picture fails, in one sentence."""
    code = (
        "from pwm_torchrl.envs import make_dm_control_env, render_frame\n"
        "env = make_dm_control_env('cartpole', 'swingup')\n"
        "env.rollout(2)\n"
        "try:\n    render_frame(env)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    environment["__EGL_VENDOR_LIBRARY_FILENAMES"] = os.devnull
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "cannot be rendered here" in out.stdout
    assert "MUJOCO_GL=osmesa" in out.stdout


def test_a_half_made_viewer_does_not_complain(capsys):
    """As gymnasium's, whose destructor frees a context that its constructor never made."""

    class Viewer:
        def __init__(self):
            raise RuntimeError("no OpenGL")

        def __del__(self):
            self.context.free()

    with pytest.raises(ConfigurationError, match=r"hopper .*MUJOCO_GL=.*no OpenGL"):
        draw_or_explain("hopper", Viewer)
    assert capsys.readouterr().err == ""
