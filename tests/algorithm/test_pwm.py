"""The robust algorithm: its sets of updates, its targets, its unit of rewards, and going on anywhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from training_cases import Bench, config, trajectories

from pwm_torchrl.algorithm.pwm import q_targets

SETS = 3
CONFIG: dict[str, Any] = {
    "algorithm.name": "pwm",
    "algorithm.horizon": 2,
    "algorithm.slice_steps": 4,
    "algorithm.updates_per_step": 0.5,
    "algorithm.max_updates": SETS,
    "algorithm.critic_batch": 8,
    "algorithm.critic_steps": 3,
    "algorithm.normalize_observations": True,
    "algorithm.scale_rewards": True,
    "algorithm.state_std": True,
    "algorithm.final_lr": None,
    "model.loss.one_step_weight": 1.0,
    "memory.model_micro_batch": 3,
}


def bench(**changes: Any) -> Bench:
    made = Bench(config({**CONFIG, **{key.replace("__", "."): value for key, value in changes.items()}}))
    made.networks.model.reward_deviation.update(made.data["next", "reward"])
    made.networks.model.observation_statistics.update(made.data["observation"])
    return made


class Stopped(Exception):
    pass


class StopAt:
    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.call + 1:
            raise Stopped


class TestSets:
    def test_an_epoch_fits_the_model_first_then_makes_sets_of_three(self) -> None:
        made = bench()
        before = made.snapshots()
        made.step()
        assert made.algorithm.updates.made == 3 + 3 * SETS
        assert all(any(flags) for flags in made.changed(before).values())
        made.step()
        assert made.algorithm.updates.made == 3 + 6 * SETS

    @pytest.mark.parametrize(("per_step", "limit", "expected"), [(0.05, 100, 4), (0.05, 3, 3), (1e-6, 100, 1)])
    def test_as_many_as_were_collected_steps_for(self, per_step: float, limit: int, expected: int) -> None:
        made = bench(algorithm__updates_per_step=per_step, algorithm__max_updates=limit)
        steps = made.data.numel()
        made.step()
        wanted = min(limit, max(1, round(per_step * steps)))
        assert made.algorithm.updates.made == 3 + 3 * wanted
        assert steps != 80 or wanted == expected

    @pytest.mark.parametrize("mode", ["online", "extract"])
    def test_the_table_and_the_epoch_have_the_same_number(self, mode: str) -> None:
        envs, steps = trajectories().shape
        changes = {"algorithm.max_updates": 100, "algorithm.actor_updates": 7, "algorithm.collect_steps": steps}
        cfg = config({**CONFIG, **changes, "mode": mode, "env.num_envs": envs})
        made = bench(**changes)
        made.algorithm.stored = mode == "extract"
        made.step()
        planned = {update.per_epoch for update in made.algorithm.updates_of(cfg)}
        assert planned == {(made.algorithm.updates.made - 3) // 3}
        assert (planned == {7}) == (mode == "extract")

    def test_rates_are_constant(self) -> None:
        made = bench()
        rows = [made.step() for _ in range(4)]
        assert {row["lr/actor"] for row in rows} == {made.algorithm.cfg.actor_lr}

    @pytest.mark.parametrize("final", [None, 1e-5])
    def test_the_temperature_has_a_rate_of_its_own(self, final: float | None) -> None:
        """Adam's first step is the rate itself, whatever the gradient."""
        moved = {}
        for slow in (None, 5e-5):
            made = bench(algorithm__temperature_lr=slow, algorithm__final_lr=final, training__epochs=2)
            actor, optimizer = made.networks.actor, made.algorithm.optimizers["actor"]
            optimizer.set_progress(0.5)
            before = [p.detach().clone() for p in actor.parameters()]
            for parameter in actor.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            after = dict(zip(actor.parameters(), before, strict=True))
            step = {p is actor.log_temperature: (old - p).abs().max().item() for p, old in after.items()}
            moved[slow] = step[True] / step[False]
        assert moved[None] == pytest.approx(1, rel=0.05)
        assert moved[5e-5] == pytest.approx(5e-5 / made.algorithm.cfg.actor_lr, rel=0.05)

    def test_the_slow_critics_follow(self) -> None:
        made = bench(algorithm__target_rate=0.25)
        made.step()  # in the unit of the data from here on
        slow = [p.clone() for p in made.algorithm.target_critic.params]
        made.algorithm.update_critic(_row())
        for before, now, critic in zip(slow, made.algorithm.target_critic.params, made.networks.critic.params):
            torch.testing.assert_close(now, before + 0.25 * (critic - before))

    @pytest.mark.parametrize("horizon", [0, 1, 5])
    def test_the_horizon_is_a_dial(self, horizon: int) -> None:
        row = bench(algorithm__horizon=horizon).step()
        assert torch.tensor(list(row.values())).isfinite().all()
        assert (row["imagination/reward"] == 0) == (horizon == 0)


def _row() -> Any:
    from pwm_torchrl.algorithm.base import MetricRow

    return MetricRow()


class TestTargets:
    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("end", ["none", "terminated", "truncated"])
    def test_written_out(self, steps: int, end: str) -> None:
        """The second transition of the first slice ends an episode, or none does."""
        made = bench()
        networks, target = made.networks, made.algorithm.target_critic
        slices = made.replay.sample_slices(5)
        slices["next", "done"][:], slices["next", "terminated"][:] = False, False
        if end != "none":
            slices["next", "done"][0, 1] = True
            slices["next", "terminated"][0, 1] = end == "terminated"
        torch.manual_seed(4)
        states = q_targets(networks.model, networks.actor, target, slices, 0.9, steps)
        torch.manual_seed(4)
        taken = [min(steps, 2) if end != "none" and row == 0 else steps for row in range(5)]
        last = torch.stack([slices["next", "observation"][row, n - 1] for row, n in enumerate(taken)])
        z = networks.model.encode(last)
        mean, std = networks.actor(z)
        u = mean + std * torch.randn_like(mean)
        log_prob = torch.distributions.Normal(mean, std).log_prob(u) - (1 - torch.tanh(u).square()).log()
        weight = networks.actor.temperature * target.scale
        value = target.value(z, torch.tanh(u)) - weight * log_prob.sum(-1, keepdim=True)
        for row, n in enumerate(taken):
            expected = sum(0.9**k * slices["next", "reward"][row, k] for k in range(n))
            if not (end == "terminated" and row == 0 and n == 2):
                expected = expected + 0.9**n * value[row]
            torch.testing.assert_close(states["value_target"][row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states["latent"], networks.model.encode(slices["observation"][:, 0]))
        assert torch.equal(states["action"], slices["action"][:, 0])
        assert not any(value.requires_grad for value in states.values())


class TestUnit:
    def test_predictions_stay_when_the_unit_moves(self) -> None:
        made = bench()
        made.step()
        model, critic = made.networks.model, made.networks.critic
        z, a = torch.rand(6, 16), torch.rand(6, 1)
        before = model.reward.decode(model.reward(z, a)), critic(z, a)
        made.networks.model.reward_deviation.update(torch.randn(50, 1) * 30)
        model.rescale()
        critic.rescale(model.reward_deviation.value)
        assert critic.scale == model.reward.scale > 2
        torch.testing.assert_close(model.reward.decode(model.reward(z, a)), before[0])
        torch.testing.assert_close(critic(z, a), before[1])

    def test_rewards_a_thousand_times_as_large_are_learned_alike(self) -> None:
        rows, made_of = [], trajectories()
        for factor in (1.0, 1000.0):
            data = made_of.clone()
            data["next", "reward"] *= factor
            made = Bench(config(CONFIG), data)
            with torch.no_grad():  # or the first values would be a thousand times smaller in their unit
                made.networks.critic.params[-2].zero_()
                made.algorithm.target_critic.params[-2].zero_()
            made.networks.model.reward_deviation.update(data["next", "reward"])
            torch.manual_seed(5)
            rows.append(made.step())
        for key in ("loss/model", "loss/critic", "loss/actor", "grad_norm/actor", "policy/entropy"):
            assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-2), key


class TestBetweenTwoUpdates:
    """Where an epoch is left, it goes on: in the same process or, with what was saved, in another."""

    PLACES = 3 + 3 * SETS

    def two_epochs(self, made: Bench) -> list[dict[str, float]]:
        rows = [made.step() for _ in range(2)]
        return [{key: value for key, value in row.items() if not key.startswith("memory/")} for row in rows]

    def left(self, made: Bench, place: int) -> None:
        torch.manual_seed(11)
        made.algorithm.between = StopAt(place)
        with pytest.raises(Stopped):
            made.step()
        assert made.algorithm.updates.made == place

    @pytest.mark.parametrize("place", range(PLACES))
    def test_left_there_and_restored(self, place: int) -> None:
        whole = bench()
        torch.manual_seed(11)
        expected = self.two_epochs(whole)
        generator = torch.get_rng_state()
        first, second = bench(), bench()
        self.left(first, place)
        for (name, ours), (_, theirs) in zip(second.networks.items(), first.networks.items(), strict=True):
            ours.load_state_dict(theirs.state_dict())
            adam = first.optimizers[name].optimizer.state_dict()
            second.optimizers[name].optimizer.load_state_dict(copy.deepcopy(adam))
        saved = io.BytesIO()
        torch.save(first.algorithm.state_dict(), saved)
        saved.seek(0)
        second.algorithm.load_state_dict(torch.load(saved, weights_only=True))
        assert self.two_epochs(second) == expected
        assert torch.equal(torch.get_rng_state(), generator)
        for name, weights in whole.snapshots().items():
            assert all(map(torch.equal, second.snapshots()[name], weights)), name


def critic_after(refusals: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The critics after an update in a new unit of rewards, whose first ``refusals`` attempts run out of memory."""
    made = bench()
    made.step()
    made.networks.model.reward_deviation.update(torch.linspace(-60, 60, 50).unsqueeze(1))
    states = TensorDict(
        latent=torch.full((8, 16), 1 / 8), action=torch.zeros(8, 1), value_target=torch.ones(8, 1), batch_size=[8]
    )
    backward, calls = made.losses.critic.backward, []

    def refusing(data: Any, size: int | None = None, **more: Any) -> Any:
        losses = backward(data, 4, **more)
        calls.append(size)
        if len(calls) <= refusals:
            raise MemoryError("can't allocate memory")
        return losses

    monkeypatch.setattr(made.losses.critic, "backward", refusing)
    made.algorithm.updates.critic(lambda: states, 8)
    assert len(calls) == refusals + 1
    return made.snapshots()["critic"]


def test_an_update_that_ran_out_of_memory_is_repeated_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit moves inside the update; nothing of the attempt that failed is left."""
    once, again = (critic_after(refusals, monkeypatch) for refusals in (0, 1))
    assert all(map(torch.equal, once, again))
