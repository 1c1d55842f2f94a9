"""Imagination as an environment."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import MPPIPlanner, ValueOperator
from torchrl.modules import WorldModel as TorchRLWorldModel
from torchrl.objectives.value import TDLambdaEstimator

from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.envs import LatentImaginationEnv
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import Actor, TaskWorldModel, WorldModel, WorldModelSpec, make_world_model
from pwm_torchrl.objectives import imagine

OBS, A, D, B, H = 4, 3, 16, 6, 5
DIMS = (3, 1, 2, 3)
FLOW = {"kind": "flow", "substeps": 2}
TASKS = {"num_tasks": 4, "task_dim": 6, "action_dims": DIMS}


def spec(**options: object) -> WorldModelSpec:
    return WorldModelSpec(OBS, A, D, [12], [12], **options)


def randomized(module: nn.Module) -> nn.Module:
    """Weights far from the initialisation, whose zeros would hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.4)
    return module


def model_of(**options: object) -> WorldModel:
    return randomized(make_world_model(spec(**options)))


def latents(*batch: int) -> Tensor:
    return torch.randn(*batch, D // 8, 8).softmax(-1).flatten(-2)


def states(tasks: bool, *batch: int) -> TensorDict:
    data = TensorDict(latent=latents(*batch), batch_size=batch)
    return data.set("task", torch.randint(len(DIMS), batch)) if tasks else data


def policy_of(actor: Actor, detach: bool = False) -> TensorDictModule:
    return TensorDictModule(lambda z: actor.act(z.detach() if detach else z), ["latent"], ["action"])


class Ends(nn.Module):
    """A termination head that says what is told."""

    threshold = 0.5

    def __init__(self, *ends: bool) -> None:
        super().__init__()
        self.ends = torch.tensor(ends).unsqueeze(-1)

    def forward(self, latent: Tensor, task_embedding: Tensor | None = None) -> Tensor:
        return torch.where(self.ends, 9.0, -9.0).expand(*latent.shape[:-1], 1)

    def terminated(self, logit: Tensor) -> Tensor:
        return logit > 0


MODELS = {
    "mlp": {},
    "flow, two-hot": {"dynamics": FLOW, "reward_head": "two_hot"},
    "termination": {"termination": True},
    "tasks": {**TASKS, "termination": True},
}


@pytest.mark.parametrize("batch", [(), (B,), (2, 3)], ids=str)
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_specs_are_kept(options: dict, differentiable: bool, batch: tuple[int, ...]) -> None:
    start = states("num_tasks" in options, 50)
    for horizon in (None, 2):
        env = LatentImaginationEnv(
            model_of(**options), start=start, horizon=horizon, batch_size=batch, differentiable=differentiable
        )
        check_env_specs(env, break_when_any_done="both")
        assert env.batch_locked == bool(batch)


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_rollout_is_an_imagined_one_to_the_bit_and_so_are_its_gradients(options: dict, detach: bool) -> None:
    model, actor = model_of(**options), randomized(Actor(D, A, [10]))
    start = states("num_tasks" in options, B)
    task = start.get("task", None)
    start["latent"].requires_grad_()
    env = LatentImaginationEnv(model, differentiable=True)
    # what follows the end of a rollout is imagined by both
    env.any_done = lambda tensordict: False
    rollout = env.rollout(H, policy_of(actor, detach), tensordict=start, set_state=True, break_when_any_done=False)
    mask = model.mask_action
    core = imagine(
        lambda z, a: model(z, mask(a, task), task), lambda z, _: actor.act(z), start["latent"], H, None, detach
    )
    assert torch.equal(rollout["latent"], core.latent[:-1].transpose(0, 1))
    assert torch.equal(rollout["next", "latent"], core.latent[1:].transpose(0, 1))
    for key, value in (("reward", core.reward), ("terminated", core.terminated)):
        assert torch.equal(rollout["next", key], value.transpose(0, 1))
    assert torch.equal(rollout["action"], core.action.transpose(0, 1))
    wanted = [start["latent"], *actor.net.parameters(), *model.dynamics.parameters(), *model.reward.parameters()]
    ours, theirs = (
        torch.autograd.grad(r.sum(), wanted) for r in (rollout["next", "reward"].transpose(0, 1).clone(), core.reward)
    )
    for name, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(x, y), name
        assert x.abs().sum() > 0


def test_without_gradients_there_is_no_graph() -> None:
    model, actor = model_of(), randomized(Actor(D, A, [10]))
    start = TensorDict(latent=latents(B).requires_grad_(), batch_size=[B])
    plain = LatentImaginationEnv(model).rollout(H, policy_of(actor), tensordict=start.copy(), set_state=True)
    kept = LatentImaginationEnv(model, differentiable=True).rollout(
        H, policy_of(actor), tensordict=start.copy(), set_state=True
    )
    for key in ("latent", ("next", "latent"), ("next", "reward")):
        assert not plain[key].requires_grad
        assert kept[key].requires_grad
        assert torch.equal(plain[key], kept[key])


def test_a_graph_passes_through_resets_and_nothing_is_written_in_place() -> None:
    """Rollouts that end at different steps and start again, and a backward pass over all of it."""
    model, actor = model_of(termination=True), randomized(Actor(D, A, [10]))
    model.termination = Ends(True, False, True, False, False, False)
    env = LatentImaginationEnv(model, start=latents(20), horizon=2, batch_size=[B], differentiable=True)
    rollout = env.rollout(4, policy_of(actor), break_when_any_done=False)
    assert rollout["next", "terminated"].squeeze(-1)[0].all()
    rollout["next", "reward"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.dynamics.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.net.parameters())
    # a new rollout carries no graph of the one before it
    env.rollout(4, policy_of(actor), break_when_any_done=False)["next", "reward"].sum().backward()


def test_truncated_at_the_horizon_and_terminated_where_the_model_says_so() -> None:
    model = model_of(termination=True)
    model.termination = Ends(False, True)
    env = LatentImaginationEnv(model, start=latents(20), horizon=3, batch_size=[2])
    data = env.rollout(7, break_when_any_done=False)["next"]
    assert data["truncated"].squeeze(-1).int().tolist() == [[0, 0, 1, 0, 0, 1, 0], [0] * 7]
    assert data["terminated"].squeeze(-1).int().tolist() == [[0] * 7, [1] * 7]
    assert torch.equal(data["done"], data["terminated"] | data["truncated"])
    assert data["imagined_steps"].squeeze(-1).tolist() == [[1, 2, 3, 1, 2, 3, 1], [1] * 7]
    one = LatentImaginationEnv(model, start=latents(20), horizon=1, batch_size=[2]).rollout(1)["next"]
    assert one["truncated"].all(), "also where the model ends the rollout in the same step"
    assert one["terminated"].flatten().tolist() == [False, True]


def test_without_horizon_and_termination_a_rollout_never_ends() -> None:
    env = LatentImaginationEnv(model_of(), start=latents(20), batch_size=[B])
    assert env.rollout(30).shape == (B, 30)
    assert "imagined_steps" not in env.observation_spec.keys()


@pytest.mark.parametrize("batch", [(2,), ()], ids=str)
def test_rows_that_end_early_wait_for_the_others(batch: tuple[int, ...]) -> None:
    def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return z + 1, a[..., :1], z[..., :1] > 0

    module = TensorDictModule(step, ["latent", "action"], [("next", k) for k in ("latent", "reward", "terminated")])
    env = LatentImaginationEnv(
        module, horizon=4, batch_size=batch, latent_spec=Unbounded((D,)), action_spec=Bounded(-1.0, 1.0, (A,))
    )
    start = TensorDict(latent=torch.tensor([[1.0], [-9.0]]).expand(2, D), batch_size=[2])
    data = env.rollout(9, tensordict=start, set_state=True, break_when_all_done=True)["next"]
    assert data["latent"][..., 0].tolist() == [[2, 2, 2, 2], [-8, -7, -6, -5]]
    assert data["terminated"].squeeze(-1).tolist() == [[True] * 4, [False] * 4]
    assert data["truncated"].squeeze(-1).tolist() == [[False] * 4, [False, False, False, True]]


def test_a_row_that_is_skipped_stays_where_it_is() -> None:
    env = LatentImaginationEnv(model_of(**TASKS), horizon=4, batch_size=[2])
    data = env.reset(states(True, 2), set_state=True).set("action", torch.ones(2, A))
    moved = env.step(data.clone())["next"]
    skipped = env.step(data.clone().set("_step", torch.tensor([True, False])))["next"]
    assert (skipped[0] == moved[0]).all()
    assert torch.equal(skipped["latent"][1], data["latent"][1])
    assert skipped["reward"][1] == skipped["imagined_steps"][1] == 0


def test_only_ended_rollouts_start_again() -> None:
    model = model_of(termination=True)
    model.termination = Ends(True, False)
    env = LatentImaginationEnv(model, start=latents(20), horizon=4, batch_size=[2])
    data = env.rollout(3, break_when_any_done=False)
    same = (data["next", "latent"][:, :-1] == data["latent"][:, 1:]).all(-1)
    assert same.tolist() == [[False, False], [True, True]]
    assert (data["latent"][0, 1:, None] == env.starts.start).all(-1).any(-1).all()


class TestStarts:
    def test_given_latents_are_drawn_by_the_seed(self) -> None:
        given = latents(1000)
        env = LatentImaginationEnv(model_of(), start=given, batch_size=[B])
        env.set_seed(3)
        first = env.reset()["latent"]
        torch.randn(3)  # draws elsewhere must not matter
        assert not torch.equal(first, env.reset()["latent"])
        env.set_seed(3)
        assert torch.equal(first, env.reset()["latent"])
        assert all((row == given).all(-1).any() for row in first)

    def test_a_replay_is_encoded_by_the_model_that_is_stepped(self) -> None:
        model, replay = model_of(), TrajectoryReplay(40, num_envs=2, horizon=4)
        observation = torch.randn(2, 11, OBS)
        flags = torch.zeros(2, 10, 1, dtype=torch.bool)
        rest = {"reward": torch.zeros(2, 10, 1), "done": flags, "terminated": flags}
        follow = TensorDict(observation=observation[:, 1:], **rest, batch_size=[2, 10])
        replay.extend(
            TensorDict(observation=observation[:, :-1], action=torch.zeros(2, 10, A), next=follow, batch_size=[2, 10])
        )
        env = LatentImaginationEnv(model, start=replay, snapshot=True)
        before = model.encode(observation.flatten(0, 1))
        randomized(model)
        for current in (before, model.encode(observation.flatten(0, 1))):
            drawn = env.reset(TensorDict({}, batch_size=[7]))["latent"]
            assert drawn.shape == (7, D)
            assert not drawn.requires_grad
            assert all(torch.isclose(row, current, atol=1e-6).all(-1).any() for row in drawn)
            env.update_snapshot()

    def test_a_buffer_of_torchrl_with_its_tasks(self) -> None:
        model, buffer = model_of(**TASKS), TensorDictReplayBuffer(storage=LazyTensorStorage(30))
        data = TensorDict(observation=torch.randn(30, OBS), task=torch.randint(4, (30,)), batch_size=[30])
        buffer.extend(data)
        reset = LatentImaginationEnv(model, start=buffer, batch_size=[B]).reset()
        encoded = model.encode(data["observation"], data["task"])
        for row in reset:
            same = torch.isclose(row["latent"], encoded, atol=1e-6).all(-1) & (row["task"] == data["task"])
            assert same.any()

    @pytest.mark.parametrize("kind", ["latents", "states", "observations"])
    def test_a_function_of_the_number_of_states(self, kind: str) -> None:
        model, counts = model_of(), []

        def draw(count: int) -> Tensor | TensorDict:
            counts.append(count)
            if kind == "observations":
                return TensorDict(observation=torch.ones(count, OBS), batch_size=[count])
            return latents(count) if kind == "latents" else states(False, count)

        assert LatentImaginationEnv(model, start=draw, batch_size=[2, 3]).reset()["latent"].shape == (2, 3, D)
        assert counts == [6]

    def test_a_rollout_starts_at_given_states(self) -> None:
        own = states(True, 7)
        env = LatentImaginationEnv(model_of(**TASKS), start=states(True, 3), horizon=2)
        rollout = env.rollout(2, tensordict=own.copy(), set_state=True)
        assert torch.equal(rollout["latent"][:, 0], own["latent"])
        assert torch.equal(rollout["task"], own["task"].unsqueeze(1).expand(7, 2))
        assert not torch.equal(env.reset(own.copy(), set_state=False)["latent"], own["latent"])
        # the environment is stateless, so a rollout can continue from any state
        on = env.rollout(3, tensordict=own.copy(), auto_reset=False)
        assert torch.equal(on["latent"][:, 0], own["latent"])
        assert on.shape == (7, 2)

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            (None, "start=None"),
            (TensorDict(other=torch.zeros(3), batch_size=[3]), "lacks"),
            (lambda count: latents(count + 1), r"batch size \[7\] instead of \[6\]"),
        ],
    )
    def test_missing_entries(self, start: object, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            LatentImaginationEnv(model_of(), start=start, batch_size=[B]).reset()

    def test_a_start_of_another_type(self) -> None:
        with pytest.raises(ConfigurationError, match="start is a str"):
            LatentImaginationEnv(model_of(), start="replay")

    def test_a_state_without_its_task_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'task'"):
            LatentImaginationEnv(model_of(**TASKS), start=latents(5), batch_size=[B]).reset()


class TestTasks:
    @pytest.mark.parametrize("task", range(4))
    def test_one_task_for_all_is_the_bound_model(self, task: int) -> None:
        model = model_of(**TASKS)
        bound = TaskWorldModel(model, spec(**TASKS), task, observation_dim=OBS, action_dim=DIMS[task])
        many = LatentImaginationEnv(model, start=latents(9), task=task)
        one = LatentImaginationEnv(bound, start=latents(9), batch_size=[B])
        check_env_specs(one)
        assert one.action_spec.shape == (B, DIMS[task])
        assert "task" not in one.observation_spec.keys()
        start, action = latents(B), 2 * torch.rand(B, A) - 1
        batch = TensorDict(latent=start, action=action, batch_size=[B])
        batch["task"] = torch.full((B,), task)
        a = many.step(batch.clone())["next"]
        b = one.step(batch.select("latent", "action").set("action", action[:, : DIMS[task]]))["next"]
        torch.testing.assert_close(a["latent"], b["latent"])
        torch.testing.assert_close(a["reward"], b["reward"])
        assert torch.equal(many.reset(TensorDict({}, batch_size=[B]))["task"], batch["task"])

    def test_padding_of_actions_does_not_matter(self) -> None:
        model = model_of(**TASKS)
        env = LatentImaginationEnv(model, differentiable=True)
        batch = states(True, B).set("action", torch.randn(B, A).requires_grad_())
        action = batch["action"]
        env.step(batch)["next", "reward"].sum().backward()
        assert torch.equal(action.grad != 0, model.task.mask(batch["task"]) > 0)
        assert torch.equal(batch["action"], action), "the action itself stays as it is"

    @pytest.mark.parametrize("rows", [1, 4])
    def test_mask_of_a_model_that_masks_nothing(self, rows: int) -> None:
        seen = []

        def step(z: Tensor, a: Tensor, task: Tensor | None = None) -> tuple[Tensor, ...]:
            seen.append(a)
            return z, a.sum(-1, keepdim=True)

        mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
        keys = ["latent", "action", *(["task"] if rows > 1 else [])]
        foreign = TensorDictModule(step, keys, [("next", "latent"), ("next", "reward")])
        env = LatentImaginationEnv(
            foreign, start=states(rows > 1, 5), action_mask=mask if rows > 1 else mask[2], batch_size=[B],
            action_spec=Bounded(-1.0, 1.0, (A,)),
        )  # fmt: skip
        data = env.rollout(1)
        wanted = mask[data["task"][:, 0]] if rows > 1 else mask[2].expand(B, A)
        assert torch.equal(seen[-1] != 0, wanted > 0)

    def test_what_does_not_exist_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"task=4 .*4 tasks"):
            LatentImaginationEnv(model_of(**TASKS), task=4)
        with pytest.raises(ConfigurationError, match="task=0 "):
            LatentImaginationEnv(model_of(), task=0)
        with pytest.raises(ConfigurationError, match=r"action_mask .*\[4, 3\]"):
            LatentImaginationEnv(model_of(), action_mask=torch.ones(4, A))


class TestSnapshot:
    def test_a_snapshot_stays_until_it_is_updated_and_takes_no_gradient(self) -> None:
        model = model_of(normalize_observations=True)
        frozen = LatentImaginationEnv(model, snapshot=True, differentiable=True)
        live = LatentImaginationEnv(model, differentiable=True)
        batch = states(False, B).set("action", torch.randn(B, A).requires_grad_())

        def reward(env: LatentImaginationEnv) -> Tensor:
            return env.step(batch.copy())["next", "reward"]

        first = reward(frozen)
        assert torch.equal(first, reward(live))
        first.sum().backward()
        assert batch["action"].grad.abs().sum() > 0
        assert all(p.grad is None for p in model.parameters())
        randomized(model)
        model.observation_statistics.update(torch.randn(9, OBS))
        assert torch.equal(first, reward(frozen))
        assert not torch.equal(first, reward(live))
        frozen.update_snapshot()
        assert torch.equal(reward(frozen), reward(live))
        observation = TensorDict(observation=torch.randn(3, OBS), batch_size=[3])
        assert torch.equal(frozen.encode(observation)["latent"], model.encode(observation["observation"]))
        reward(live).sum().backward()
        assert all(p.grad is not None for p in model.reward.parameters())

    def test_its_parameters_are_no_ones(self) -> None:
        model = model_of()
        frozen, live = (LatentImaginationEnv(model, snapshot=s) for s in (True, False))
        assert not any(p.requires_grad for p in frozen.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert {id(p) for p in live.parameters()} == {id(p) for p in model.parameters()}
        assert not {id(p) for p in frozen.parameters()} & {id(p) for p in model.parameters()}
        with pytest.raises(ConfigurationError, match="snapshot=False"):
            live.update_snapshot()

    def test_copies_and_pickles_are_environments_of_their_own(self) -> None:
        env = LatentImaginationEnv(model_of(), start=latents(9), horizon=3, batch_size=[B])
        env.set_seed(0)
        copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
        reset = env.reset().set("action", torch.ones(B, A))
        result = env.step(reset.clone())["next", "latent"]
        randomized(env.stepped_model)
        for each in copies:
            assert torch.equal(each.reset()["latent"], reset["latent"])
            assert torch.equal(each.step(reset.clone())["next", "latent"], result)

    def test_another_device_needs_a_copy(self) -> None:
        with pytest.raises(ConfigurationError, match=r"device=meta .*cpu"):
            LatentImaginationEnv(model_of(), device="meta")
        assert LatentImaginationEnv(model_of(), device="meta", snapshot=True).device.type == "meta"


def torchrl_model(done: bool = False, latent: object = "latent") -> TorchRLWorldModel:
    """TorchRL's WorldModel of plain layers."""
    head = TensorDictModule(lambda z: z[..., :1] > 0, [("next", latent)], [("next", "done")])
    return TorchRLWorldModel(
        TensorDictModule(nn.Linear(OBS, D), ["pixels"], [latent]),
        TensorDictModule(lambda z, a: z + 0.1 * a.mean(-1, keepdim=True), [latent, "action"], [("next", latent)]),
        TensorDictModule(nn.Linear(D, 1), [("next", latent)], [("next", "reward")]),
        done_head=head if done else None,
    )


class TestForeignModels:
    ACTION = Bounded(-1.0, 1.0, (A,))

    @pytest.mark.parametrize("done", [False, True])
    @pytest.mark.parametrize("latent", ["latent", ("agent", "state")], ids=str)
    def test_torchrls_world_model(self, done: bool, latent: object) -> None:
        model = torchrl_model(done, latent)
        start = TensorDict(pixels=torch.randn(30, OBS), batch_size=[30])
        env = LatentImaginationEnv(model, start=start, action_spec=self.ACTION, horizon=4, batch_size=[B])
        check_env_specs(env, break_when_any_done="both")
        data = env.rollout(4, break_when_any_done=False)
        follow = data["next", latent]
        assert torch.equal(follow, data[latent] + 0.1 * data["action"].mean(-1, keepdim=True)), "the latent advances"
        torch.testing.assert_close(data["next", "reward"], model.reward_head.module(follow))
        assert torch.equal(data["next", "terminated"], (follow[..., :1] > 0) & done)

    def test_states_of_several_entries(self) -> None:
        def step(h: Tensor, s: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            return h + 1, s + h[..., :2], a.sum(-1, keepdim=True)

        module = TensorDictModule(
            step, ["belief", "state", "action"], [("next", "belief"), ("next", "state"), ("next", "reward")]
        )
        start = TensorDict(belief=torch.zeros(9, 5), state=torch.zeros(9, 2), batch_size=[9])
        shapes = Composite(belief=Unbounded((5,)), state=Unbounded((2,)))
        for given in (None, shapes):
            env = LatentImaginationEnv(
                module, start=start, action_spec=self.ACTION, latent_spec=given, batch_size=[B]
            )  # fmt: skip
            check_env_specs(env)
            data = env.rollout(4)["next"]
            assert data["belief"][0, :, 0].tolist() == [1, 2, 3, 4]
            assert data["state"][0, :, 0].tolist() == [0, 1, 3, 6]

    def test_a_state_of_several_dimensions(self) -> None:
        module = TensorDictModule(
            lambda z, a: (z * 2, a[..., :1]), ["map", "action"], [("next", "map"), ("next", "reward")]
        )
        start = TensorDict(map=torch.ones(9, 2, 3, 4), batch_size=[9])
        for batch in ((), (B,)):
            env = LatentImaginationEnv(module, start=start, action_spec=self.ACTION, batch_size=batch)
            check_env_specs(env)
            assert env.rollout(3)["next", "map"].shape == (*batch, 3, 2, 3, 4)

    @pytest.mark.parametrize(
        ("reads", "writes", "message"),
        [
            (["latent", "action"], [("next", "latent")], "write"),
            (["latent"], [("next", "latent"), ("next", "reward")], "the action"),
            (["z", "latent", "action"], [("next", "latent"), ("next", "reward")], "nothing else"),
            (["latent", "action"], ["latent", ("next", "reward")], "a state"),
        ],
    )
    def test_modules_with_other_entries(self, reads: list, writes: list, message: str) -> None:
        module = TensorDictModule(lambda *x: x[: len(writes)], reads, writes)
        with pytest.raises(ConfigurationError, match=message):
            LatentImaginationEnv(module, action_spec=self.ACTION)

    def test_missing_specs(self) -> None:
        with pytest.raises(ConfigurationError, match="Linear"):
            LatentImaginationEnv(nn.Linear(2, 2))
        with pytest.raises(ConfigurationError, match="action_spec"):
            LatentImaginationEnv(torchrl_model(), latent_spec=Unbounded((D,)))
        with pytest.raises(ConfigurationError, match="latent_spec"):
            LatentImaginationEnv(torchrl_model(), action_spec=self.ACTION)
        with pytest.raises(ConfigurationError, match=r"latent_spec .*'z'"):
            LatentImaginationEnv(torchrl_model(), action_spec=self.ACTION, latent_spec=Composite(z=Unbounded((D,))))

    @pytest.mark.parametrize("flat", ["reward", "done", "float"])
    def test_outputs_of_wrong_shape_or_dtype(self, flat: str) -> None:
        def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
            r, end = a.sum(-1, keepdim=True), a[..., :1] > 0
            end = end.float() if flat == "float" else end
            return z, r.squeeze(-1) if flat == "reward" else r, end.squeeze(-1) if flat == "done" else end

        module = TensorDictModule(
            step, ["latent", "action"], [("next", "latent"), ("next", "reward"), ("next", "done")]
        )
        env = LatentImaginationEnv(module, start=latents(3), action_spec=self.ACTION, batch_size=[B])
        with pytest.raises(ValueError, match="torch.float32" if flat == "float" else "broadcast"):
            env.rollout(1)


def test_torchrls_planner_plans_in_it() -> None:
    """The reward is the first action, so planned ones are near 1."""

    def step(z: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return z, a[..., :1]

    module = TensorDictModule(step, ["latent", "action"], [("next", "latent"), ("next", "reward")])
    env = LatentImaginationEnv(module, latent_spec=Unbounded((D,)), action_spec=Bounded(-1.0, 1.0, (A,)))
    value = ValueOperator(nn.Linear(D, 1), in_keys=["latent"])
    planner = MPPIPlanner(
        env, TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value), temperature=1.0, planning_horizon=3,
        optim_steps=5, num_candidates=64, top_k=8,
    )  # fmt: skip
    planned = planner(states(False, 2))["action"]
    assert planned.shape == (2, A)
    assert (planned[:, 0] > 0.8).all()


def test_collectors_and_transforms_take_it() -> None:
    model, actor = model_of(), randomized(Actor(D, A, [10]))
    env = TransformedEnv(LatentImaginationEnv(model, start=latents(20), horizon=4, batch_size=[B]), RewardSum())
    check_env_specs(env)
    collector = Collector(
        env, policy_of(actor), frames_per_batch=10 * B, total_frames=20 * B, auto_register_policy_transforms=False
    )
    data = torch.cat(list(collector), 1)
    collector.shutdown()
    assert data["next", "done"].squeeze(-1).sum(1).tolist() == [5] * B
    torch.testing.assert_close(data["next", "episode_reward"][:, 3], data["next", "reward"][:, :4].sum(1))


def test_horizon_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="horizon=0"):
        LatentImaginationEnv(model_of(), horizon=0)
