"""Brax's environments behind the common interface. They run where Brax is installed: ``pip install -e '.[brax]'``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from pwm_torchrl.envs import env_info, make_brax_env, make_env
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

installed = find_spec("brax") is not None and find_spec("jax") is not None
with_brax = pytest.mark.skipif(not installed, reason="needs Brax: pip install 'pwm-torchrl[brax]'")


def cfg(**changes: Any) -> dict[str, Any]:
    return {
        "_target_": "pwm_torchrl.envs.make_brax_env",
        "name": "brax_inverted_pendulum",
        "id": "inverted_pendulum",
        "backend": "positional",  # compiles in seconds
        "episode_length": 12,
        **changes,
    }


@pytest.mark.skipif(installed, reason="Brax is installed")
def test_says_what_to_install() -> None:
    with pytest.raises(MissingLibraryError, match=r"env.id=ant needs .*pwm-torchrl\[brax\]"):
        make_brax_env("ant")


@with_brax
class TestWithBrax:
    def test_rows_begin_anew_one_by_one_and_seeds_repeat(self) -> None:
        env = make_env(cfg(), num_envs=3, seed=4)
        info = env_info(env)
        assert (info.observation_dim, info.action_dim, info.episode_length, info.num_envs) == (4, 1, 12, 3)
        steps = env.rollout(30, break_when_any_done=False)
        done = steps["next", "done"].squeeze(-1)
        assert done.any()
        assert (steps["next", "truncated"] | steps["next", "terminated"]).squeeze(-1).equal(done)
        continued = (steps["next", "observation"][:, :-1] == steps["observation"][:, 1:]).all(-1)
        assert torch.equal(continued, ~done[:, :-1])
        again = make_env(cfg(), num_envs=3, seed=4)
        assert torch.equal(again.reset()["observation"], steps["observation"][:, 0])

    def test_repeated_actions_add_up_rewards(self) -> None:
        """Upright, one step of the task is worth 1."""
        env = make_env(cfg(action_repeat=3), num_envs=2, seed=0)
        state = env.reset().set("action", torch.zeros(2, 1))
        assert env.step(state)["next", "reward"].tolist() == [[3.0], [3.0]]

    @pytest.mark.parametrize(
        ("changes", "message"), [({"id": "antt"}, "did you mean ant"), ({"backend": "none"}, "Brax cannot make")]
    )
    def test_refuses(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            make_env(cfg(**changes), num_envs=1, seed=0)
