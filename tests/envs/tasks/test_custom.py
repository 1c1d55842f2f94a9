"""The custom tasks: rewards against the formulas written out, models and starts of episodes against what is said."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("dm_control")

from pwm_torchrl.envs.tasks import make_custom_dm_control_env, make_task_env
from pwm_torchrl.errors import ConfigurationError

INF = float("inf")


def tol(x: float, low: float, high: float, margin: float = 0.0, value: float = 0.1, shape: str = "gaussian") -> float:
    """1 inside of [low, high]; outside ``value`` at a distance of ``margin``."""
    distance = max(low - x, x - high, 0.0)
    if margin == 0 or distance == 0:
        return float(distance == 0)
    if shape == "linear":
        return max(0.0, 1 - (1 - value) * distance / margin)
    return value ** ((distance / margin) ** 2)


def backwards_walker(speed):
    def reward(p):
        upright, height = p.named.data.xmat["torso", "zz"], p.named.data.xpos["torso", "z"]
        stand = (3 * tol(height, 1.2, INF, 0.6) + (1 + upright) / 2) / 4
        move = tol(p.named.data.sensordata["torso_subtreelinvel"][0], -INF, -speed, speed / 2, 0.5, "linear")
        return stand * (5 * move + 1) / 6

    return reward


def cheetah(p):
    """Heights of torso, back foot and front foot, and speed."""
    heights = [p.named.data.xpos[body, "z"] for body in ("torso", "bfoot", "ffoot")]
    return (*heights, p.named.data.sensordata["torso_subtreelinvel"][0])


def backwards_cheetah(p):
    return tol(cheetah(p)[3], -INF, -8, 8, 0, "linear")


def one_foot(place):
    def reward(p):
        torso, foot, speed = (cheetah(p)[i] for i in (0, place, 3))
        up = (3 * tol(foot, 1.2, INF, 0.6) + 2 * tol(torso, 1.2, INF, 0.6)) / 5
        return up * (5 * tol(speed, 6, INF, 6, 0, "linear") + 1) / 6

    return reward


def jump(p):
    torso, back, front, speed = cheetah(p)
    up = [tol((torso + foot) / 2, 1.2, INF, 0.6) for foot in (back, front)]
    return sum((5 * height + tol(speed, -0.5, 0.5, 0.5, 0, "linear")) / 6 for height in up) / 2


def backwards_hopper(p):
    height = p.named.data.xipos["torso", "z"] - p.named.data.xipos["foot", "z"]
    speed = p.named.data.sensordata["torso_subtreelinvel"][0]
    return tol(height, 0.6, 2) * tol(speed, -INF, -1, 0.5, 0.5, "linear")


def three_links(radius):
    def reward(p):
        apart = np.linalg.norm(p.named.data.geom_xpos["target", :2] - p.named.data.geom_xpos["finger", :2])
        return float(apart <= radius + p.named.model.geom_size["finger", 0])

    return reward


def spinning_ball(p):
    apart = p.named.data.site_xpos["target", ["x", "z"]] - p.named.data.xpos["ball", ["x", "z"]]
    room = p.named.model.site_size["target", [0, 2]] - p.named.model.geom_size["ball", 0]
    far = tol(np.linalg.norm(apart), 0.5, INF, 0.25, 0.5, "linear")
    fast = tol(np.linalg.norm(p.data.qvel[2:4]), 6, INF, 3, 0.5, "linear")
    return float(not (np.abs(apart) < room).all()) * (far + 2 * fast) / 3


def spinning_pendulum(p):
    return tol(abs(p.named.data.qvel["hinge"][0]), 9, INF, 4.5, 0.5, "linear")


#: Reward, and the size of random positions and velocities that reaches all of its parts.
REWARDS = {
    "walker-walk-backwards": (backwards_walker(1), 1.0, 3.0),
    "walker-run-backwards": (backwards_walker(8), 1.0, 8.0),
    "cheetah-run-backwards": (backwards_cheetah, 1.0, 8.0),
    "cheetah-run-front": (one_foot(1), 1.0, 5.0),
    "cheetah-run-back": (one_foot(2), 1.0, 5.0),
    "cheetah-jump": (jump, 1.0, 0.5),
    "hopper-hop-backwards": (backwards_hopper, 0.6, 1.0),
    "reacher-three-easy": (three_links(0.05), 3.0, 1.0),
    "reacher-three-hard": (three_links(0.015), 3.0, 1.0),
    "cup-spin": (spinning_ball, 0.3, 4.0),
    "pendulum-spin": (spinning_pendulum, 3.0, 6.0),
}


def opened(name):
    """The registry's environment, after a reset, and its dm_control environment."""
    env = make_task_env(name)
    env.reset()
    return env, env._env.envs[0].simulator


@pytest.mark.parametrize("name", REWARDS)
def test_reward_is_the_formula(name):
    env, raw = opened(name)
    physics, random = raw.physics, np.random.RandomState(0)
    formula, spread, speed = REWARDS[name]
    ours, written = [], []
    for _ in range(200):
        with physics.reset_context():
            physics.data.qpos[:] = physics.model.qpos0 + random.uniform(-spread, spread, physics.model.nq)
            physics.data.qvel[:] = random.uniform(-speed, speed, physics.model.nv)
            if name.startswith("reacher"):  # otherwise the target is met too rarely
                physics.forward()
                close = physics.named.data.geom_xpos["finger", :2] + random.uniform(-0.06, 0.06, 2)
                physics.named.model.geom_pos["target", :2] = close
        ours.append(raw.task.get_reward(physics))
        written.append(formula(physics))
    np.testing.assert_allclose(ours, written, rtol=1e-9, atol=1e-12)
    assert np.ptp(written) > 0.3, "the states do not tell rewards apart"
    assert 0.0 in written or name not in ("cup-spin", "reacher-three-hard"), "the target is never met or never missed"
    env.close()


def test_floors_are_long():
    for name, floor, length in (("walker-walk-backwards", "floor", 500), ("cheetah-jump", "ground", 200)):
        assert opened(name)[1].physics.named.model.geom_size[floor, 0] == length
    for name, floor, length in (("walker-walk", "floor", 250), ("cheetah-run", "ground", 100)):
        assert opened(name)[1].physics.named.model.geom_size[floor, 0] == length


@pytest.mark.parametrize(("name", "radius"), [("reacher-three-easy", 0.05), ("reacher-three-hard", 0.015)])
def test_three_links(name, radius):
    _, raw = opened(name)
    _, stock = opened("reacher-easy")
    model, before = raw.physics.named.model, stock.physics.named.model
    assert model.geom_size["target", 0] == radius
    assert list(model.actuator_gear[:, 0]) == [0.05] * 3
    joints = ("shoulder", "elbow", "wrist")
    assert np.rad2deg(np.array([model.jnt_range[joint] for joint in joints[1:]])).tolist() == pytest.approx(
        np.array([[-80, 80]] * 2)
    )
    lengths = [2 * model.geom_size[part, 1] for part in ("arm", "forearm", "hand")]
    assert lengths == pytest.approx([0.09, 0.09, 0.1])
    assert 2 * before.geom_size["hand", 1] == pytest.approx(0.1)
    assert list(model.body_pos["finger"]) == pytest.approx([0.09, 0, 0])
    for part in ("arm", "forearm", "hand"):
        assert model.geom_size[part, 0] == before.geom_size["arm" if part != "hand" else "hand", 0]


def test_the_ball_starts_in_its_cup_nine_times_of_ten():
    env, raw = opened("cup-spin")
    inside = []
    for _ in range(200):
        raw.reset()
        qpos = raw.physics.named.data.qpos
        assert -0.2 <= qpos["ball_x"][0] <= 0.2
        assert 0.2 <= qpos["ball_z"][0] <= 0.5
        assert raw.physics.data.ncon == 0
        inside.append(bool(raw.physics.in_target()))
    assert 0.84 < np.mean(inside) < 0.98  # with probability 0.1 anywhere, which may be inside as well
    env.close()


@pytest.mark.parametrize(
    ("domain", "task", "text"),
    [
        ("waker", "walk_backwards", "env.domain='waker' is not in the custom tasks: did you mean walker or reacher?"),
        ("walker", "walk", "env.task='walk' is not a task of walker: choose run_backwards or walk_backwards"),
    ],
)
def test_unknown_names(domain, task, text):
    with pytest.raises(ConfigurationError) as caught:
        make_custom_dm_control_env(domain, task)
    assert str(caught.value) == text
