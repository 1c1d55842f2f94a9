"""How a policy fits an environment: its entries and the range of its actions, or one sentence that says why not."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper, SerialEnv
from torchrl.envs.utils import check_env_specs

from pwm_torchrl.envs import env_info, make_env, make_gymnasium_env
from pwm_torchrl.envs.standard import in_own_units, policy_specs
from pwm_torchrl.errors import ConfigurationError

from .conftest import Counter


class Specs(EnvBase):
    """Nothing but specs."""

    def __init__(self, observation: Composite, action: Composite) -> None:
        super().__init__(batch_size=observation.shape)
        self.observation_spec, self.full_action_spec = observation, action
        self.reward_spec = Unbounded((*self.batch_size, 1))

    def _reset(self, tensordict, **kwargs): ...

    def _step(self, tensordict): ...

    def _set_seed(self, seed): ...


BOX = Composite(action=Bounded(-1.0, [2.0, 3.0], (2,)))
VECTOR = Composite(observation=Unbounded((3,)))


def make_counter():
    """For a configuration."""
    return GymWrapper(Counter())


class TestEntries:
    def test_of_gymnasium(self):
        for env in (GymEnv("Pendulum-v1"), SerialEnv(2, lambda: GymEnv("Pendulum-v1"))):
            specs = policy_specs(env, 3, 1)
            assert (specs.observation_keys, specs.feature_dims, specs.action_key) == (("observation",), (1,), "action")
            assert (specs.low.tolist(), specs.high.tolist(), specs.action_dtype) == ([-2.0], [2.0], torch.float32)

    def test_of_make_env_is_the_one_that_has_all(self):
        cfg = {"_target_": f"{__name__}.make_counter", "name": "counter"}
        specs = policy_specs(make_env(cfg, num_envs=2, seed=0), 3, 2, ["count", "action"])
        assert (specs.observation_keys, specs.low.tolist()) == (("observation",), [-1.0, -1.0])

    def test_several_entries_in_the_order_of_the_environment(self):
        env = GymWrapper(Counter())
        specs = policy_specs(env, 3, 2)
        assert specs.observation_keys == tuple(env.observation_spec.keys())
        assert specs.action_dtype == torch.float64
        assert (specs.low.tolist(), specs.high.tolist()) == ([-2.0, -2.0], [4.0, 4.0])
        assert specs.low.dtype == torch.float32

    def test_in_the_order_that_the_policy_was_trained_on(self):
        assert policy_specs(GymWrapper(Counter()), 3, 2, ["action", "count"]).observation_keys == ("action", "count")

    def test_names_and_shapes_of_any_kind(self):
        observation = Composite(
            {"state": {"pose": Unbounded((5, 2, 2)), "height": Unbounded((5,))}, "step_count": Unbounded((5, 1))},
            shape=[5],
        )
        action = Composite({("robot", "torque"): Bounded(-1.0, 3.0, (5, 2))}, shape=[5])
        specs = policy_specs(Specs(observation, action), 5, 2)
        assert dict(zip(specs.observation_keys, specs.feature_dims)) == {("state", "pose"): 2, ("state", "height"): 0}
        assert (specs.action_key, specs.high.tolist()) == (("robot", "torque"), [3.0, 3.0])


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (Composite(observation=Unbounded((4,))), BOX, r"'observation' \[4\].* 3 numbers"),
        (Composite(), BOX, "no numbers"),
        (VECTOR, Composite(action=Bounded(-1.0, 1.0, (3,))), r"\[3\].*\[2\]"),
        (VECTOR, Composite(action=Categorical(4, shape=(), dtype=torch.int64)), "discrete actions"),
        (VECTOR, Composite(action=Unbounded((2,))), "unbounded action range"),
        (VECTOR, Composite(action=Bounded(-1.0, [1.0, float("inf")], (2,))), r"\[1.0, inf\]"),
        (VECTOR, Composite(left=Bounded(-1.0, 1.0, (1,)), right=Bounded(-1.0, 1.0, (1,))), "exactly one"),
    ],
)
def test_specs_that_do_not_fit(observation, action, message):
    with pytest.raises(ConfigurationError, match=message):
        policy_specs(Specs(observation, action), 3, 2)


def test_an_environment_of_gymnasium_has_to_be_wrapped():
    with pytest.raises(ConfigurationError, match=r"GymWrapper\(env\)"):
        policy_specs(gymnasium.make("Pendulum-v1"), 3, 1)


class TestOwnUnits:
    @pytest.mark.parametrize(
        "cfg",
        [
            {"_target_": "pwm_torchrl.envs.make_gymnasium_env", "id": "pwm_tests/Counter-v0"},
            {"_target_": f"{__name__}.make_counter", "name": "counter"},
        ],
        ids=["made here", "made by the user"],
    )
    def test_the_simulator_gets_the_action_that_is_given(self, cfg):
        env = in_own_units(make_env(cfg, num_envs=2, seed=0))
        check_env_specs(env)
        assert env.action_spec.space.low.unique().tolist() == [-2.0]
        assert env.action_spec.space.high.unique().tolist() == [4.0]
        assert (env_info(env).action_low, env_info(env).action_high) == ((-2.0, -2.0), (4.0, 4.0))
        given = torch.tensor([[-2.0, 4.0], [0.5, 1.0]])
        seen = env.step(env.reset().set("action", given))["next", "observation"]
        order = list(GymWrapper(Counter()).observation_spec.keys())
        columns = slice(1, 3) if order[0] == "count" else slice(0, 2)
        torch.testing.assert_close(seen[:, columns], given)

    def test_nothing_is_wrapped_without_need(self):
        env = make_env({"_target_": f"{__name__}.make_unit"}, num_envs=1, seed=0)
        assert in_own_units(env) is env

    def test_is_what_gymnasium_does(self):
        """The same reward as the plain environment's, in the same state, for the same torque."""
        env, plain = in_own_units(make_gymnasium_env("Pendulum-v1", num_envs=1, seed=3)), GymEnv("Pendulum-v1")
        torque = torch.tensor([1.3])
        ours = env.step(env.reset().set("action", torque.unsqueeze(0)))["next", "reward"]
        theirs = plain.step(plain.reset(seed=3).set("action", torque))["next", "reward"]
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def make_unit():
    """Actions in [-1, 1] as they are."""
    return GymWrapper(Counter(low=-1.0, high=1.0))
