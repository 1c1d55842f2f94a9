"""Toy environments with known answers."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces


class Counter(gymnasium.Env):
    """Counts its steps; reward k at step k; terminates after ``life`` steps; fails on request."""

    def __init__(self, life=5, fail_at=None, nan_at=None, low=-2.0, high=4.0):
        self.life, self.fail_at, self.nan_at = life, fail_at, nan_at
        self.action_space = spaces.Box(low, high, (2,), np.float64)
        self.observation_space = spaces.Dict(
            [
                ("count", spaces.Box(-np.inf, np.inf, (1,), np.float64)),
                ("action", spaces.Box(-np.inf, np.inf, (2,), np.float32)),
            ]
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observation(np.zeros(2)), {}

    def step(self, action):
        self.count += 1
        if self.count == self.fail_at:
            raise RuntimeError("the wheel came off")
        observation = self._observation(action)
        if self.count == self.nan_at:
            observation["count"][0] = np.nan
        return observation, float(self.count), self.count >= self.life, False, {}

    def _observation(self, action):
        return {
            "count": np.array([self.count], np.float64),
            "action": np.asarray(action, np.float32),
        }


gymnasium.register("pwm_tests/Counter-v0", Counter)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def play(env, tensordict, actions):
    """Steps with resets where needed; everything that came out, stacked over time, and the next TensorDict."""
    rows = []
    for action in actions:
        tensordict["action"] = action
        step, tensordict = env.step_and_maybe_reset(tensordict)
        keys = ("observation", "reward", "terminated", "truncated")
        pieces = [step["next", key].double() for key in keys] + [tensordict["observation"].double()]
        rows.append(torch.cat(pieces, -1))
    return torch.stack(rows), tensordict


def random_actions(env, steps, seed=0):
    """Actions ``[steps, N, A]`` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, *env.action_spec.shape, generator=generator) * 2 - 1
