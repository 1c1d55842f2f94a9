"""PWM: what each update changes, on which data, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import math
from itertools import chain

import pytest
import torch
from tensordict import TensorDict
from training_cases import Bench, config, live_graphs, trajectories

from pwm_torchrl.algorithm.base import MetricRow
from pwm_torchrl.modules import RewardScale
from pwm_torchrl.run.debugging import live_tensors
from pwm_torchrl.run.evaluation import gradient_profile

NAMES = ("model", "actor", "critic")


def rollout(bench: Bench, batch: int = 6, horizon: int = 4) -> TensorDict:
    """An imagined rollout as the actor loss writes it, with targets that the critics do not yet predict."""
    return TensorDict(
        latent=torch.rand(batch, horizon, 16),
        value_target=torch.randn(batch, horizon, 1),
        collector=TensorDict(mask=torch.ones(batch, horizon, 1, dtype=torch.bool), batch_size=[batch, horizon]),
        batch_size=[batch, horizon],
    )


class TestWhatChanges:
    def test_an_epoch_changes_the_three_networks(self):
        bench = Bench(config())
        before = bench.snapshots()
        bench.step()
        changes = bench.changed(before)
        for name in NAMES:
            assert all(changes[name]), name

    def test_model_update(self):
        bench = Bench(config())
        before = bench.snapshots()
        bench.algorithm.update_model(MetricRow())
        changes = bench.changed(before)
        assert any(changes["model"])
        assert not any(changes["actor"] + changes["critic"])
        self.assert_no_gradient(bench)

    def test_actor_update(self):
        bench = Bench(config())
        before = bench.snapshots()
        bench.algorithm.update_actor(bench.replay.sample_observations(8), MetricRow())
        changes = bench.changed(before)
        # The reward head starts at zero, but the critics at the rollout's end give the actor a gradient.
        assert all(changes["actor"])
        assert not any(changes["model"] + changes["critic"])
        self.assert_no_gradient(bench)

    def test_critic_update(self):
        bench = Bench(config())
        before = bench.snapshots()
        bench.update_critic(rollout(bench), MetricRow())
        changes = bench.changed(before)
        assert all(changes["critic"])
        assert not any(changes["model"] + changes["actor"])
        self.assert_no_gradient(bench)

    def test_gradient_of_one_update_does_not_reach_the_next(self):
        """The actor's update is the same whether or not a model update came before it, apart from the model."""
        results = []
        for garbage in (False, True):
            bench = Bench(config())
            observation = bench.replay.sample_observations(8)
            if garbage:
                for p in bench.networks.model.parameters():
                    p.grad = torch.full_like(p, 1e6)
            torch.manual_seed(1)
            row = MetricRow()
            bench.algorithm.update_actor(observation, row)
            results.append(row.numbers())
        assert results[0] == results[1]

    @staticmethod
    def assert_no_gradient(bench: Bench) -> None:
        assert all(p.grad is None for _, network in bench.networks.items() for p in network.parameters())


class TestUpdateCounts:
    def count(self, bench: Bench) -> dict[str, int]:
        """Optimizer steps of the next epoch."""
        counts = dict.fromkeys(NAMES, 0)
        for name, optimizer in bench.optimizers.items():
            step = type(optimizer).step

            def counted(before, name=name, optimizer=optimizer, step=step):
                counts[name] += 1
                return step(optimizer, before)

            optimizer.step = counted
        bench.step()
        for optimizer in bench.optimizers.values():
            del optimizer.step
        return counts

    def test_first_and_later_epochs(self):
        bench = Bench(config({"algorithm.actor_updates": 2}))
        # 2 actor updates, each followed by 2 passes in 2 minibatches
        assert self.count(bench) == {"model": 3, "actor": 2, "critic": 8}
        assert self.count(bench) == {"model": 2, "actor": 2, "critic": 8}

    def test_nothing_before_the_random_steps_are_over(self):
        bench = Bench(config({"algorithm.random_steps": 81}))
        assert self.count(bench) == dict.fromkeys(NAMES, 0)
        assert not bench.algorithm.started
        bench.replay.extend(trajectories(steps=1))
        assert self.count(bench) == {"model": 3, "actor": 1, "critic": 4}

    def test_more_random_steps_than_replay_holds(self):
        bench = Bench(config({"algorithm.random_steps": 1200}))
        for _ in range(14):
            bench.replay.extend(trajectories())
        assert (len(bench.replay), bench.replay.collected) == (1000, 1200)
        assert self.count(bench)["actor"] == 1

    def test_nothing_before_there_is_a_whole_slice(self):
        bench = Bench(config(), trajectories(steps=3))
        assert self.count(bench) == dict.fromkeys(NAMES, 0)


class TestModelUpdate:
    def test_logs_the_sum_and_its_parts(self):
        bench = Bench(config())
        row = MetricRow()
        bench.algorithm.update_model(row)
        numbers = row.numbers()
        parts = numbers["loss/model_dynamics"] + numbers["loss/model_reward"]
        assert numbers["loss/model"] == pytest.approx(parts)
        assert numbers["data/valid_fraction"] == 1.0

    def test_learns(self):
        torch.manual_seed(0)
        data = trajectories()
        data["next", "reward"] = 2 * data["action"]
        bench = Bench(config({"model.dynamics.kind": "mlp", "algorithm.model_lr": 3e-3}), data)
        losses = []
        for _ in range(150):
            row = MetricRow()
            bench.algorithm.update_model(row)
            losses.append(row.numbers()["loss/model_reward"])
        assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


class TestRewardNormalization:
    def test_scales_and_never_shifts(self):
        """The model sees the reward times one positive number; a zero reward stays zero."""
        bench = Bench(config())
        scale = RewardScale(2, 0.99)
        scale.update(bench.data["next", "reward"], bench.data["next", "done"])
        bench.algorithm.reward_scale = scale
        seen = []
        read = bench.losses.model.read

        def spy(batch):
            seen.append(batch["next", "reward"].clone())
            return read(batch)

        bench.losses.model.read = spy
        torch.manual_seed(2)
        bench.algorithm.update_model(MetricRow())
        torch.manual_seed(2)
        raw = bench.replay.sample_slices(8)["next", "reward"]
        factor = seen[0] / raw
        torch.testing.assert_close(factor, factor[0, 0].expand_as(factor))
        assert factor[0, 0] > 0
        assert scale(torch.zeros(3)).tolist() == [0.0] * 3

    def test_scale_is_one_over_the_spread_of_discounted_returns(self):
        gamma, scale = 0.9, RewardScale(1, 0.9)
        rewards = torch.randn(1, 50, 1) + 5
        done = torch.zeros(1, 50, 1, dtype=torch.bool)
        done[0, [9, 30]] = True
        for part in (slice(0, 20), slice(20, 50)):
            scale.update(rewards[:, part], done[:, part])
        returns, running = [], 0.0
        for reward, end in zip(rewards.flatten().tolist(), done.flatten().tolist(), strict=True):
            running = gamma * running + reward
            returns.append(running)
            running = 0.0 if end else running
        std = torch.tensor(returns).std(unbiased=False).item()
        # The first sample's pseudo-count of 1e-4 stays in the statistics.
        assert scale(torch.tensor(1.0)).item() == pytest.approx(1 / std, rel=1e-3)


class TestCriticUpdate:
    def test_states_after_the_end_do_not_count(self):
        weights = []
        for garbage in (0.0, 1e6):
            bench = Bench(config({"algorithm.critic_minibatches": 1}))
            torch.manual_seed(3)
            imagined = rollout(bench)
            mask = torch.rand(imagined["collector", "mask"].shape) < 0.5
            mask[:, 0] = True
            imagined["collector", "mask"] = mask
            imagined["value_target"] = torch.where(mask, imagined["value_target"], garbage)
            torch.manual_seed(4)
            row = MetricRow()
            bench.update_critic(imagined, row)
            weights.append((bench.snapshots()["critic"], row.numbers()["loss/critic"]))
        assert weights[0][1] == weights[1][1]
        assert all(map(torch.equal, weights[0][0], weights[1][0]))

    def test_a_minibatch_of_ended_states_only(self):
        """Early in training the model may end every rollout at once."""
        bench = Bench(config({"algorithm.critic_minibatches": 8}))
        imagined = rollout(bench)
        imagined["collector", "mask"][:, 1:] = False
        row = MetricRow()
        bench.update_critic(imagined, row)
        assert math.isfinite(row.numbers()["loss/critic"])
        assert all(p.isfinite().all() for p in bench.networks.critic.parameters())

    def test_every_state_is_visited_once_in_each_pass(self):
        bench = Bench(config({"algorithm.critic_minibatches": 5}))
        imagined = rollout(bench)
        imagined["value_target"] = torch.arange(24.0).view(6, 4, 1)
        passes, value = [], bench.losses.critic

        class Spy(torch.nn.Module):
            tensor_keys = value.tensor_keys

            def backward(self, data, micro_batch):
                passes.append(data["value_target"].flatten().tolist())
                return value.backward(data, micro_batch)

        bench.losses.critic = Spy()
        bench.update_critic(imagined, MetricRow())
        assert [len(p) for p in passes] == [5, 5, 5, 5, 4] * 2
        first, second = list(chain(*passes[:5])), list(chain(*passes[5:]))
        assert sorted(first) == sorted(second) == list(range(24))
        assert first != second != list(range(24))


class TestStarts:
    def test_replayed(self):
        bench = Bench(config({"algorithm.actor_batch": 300}))
        starts = bench.algorithm.start_observations(trajectories(steps=4))
        stored = bench.data["observation"].flatten(0, 1)
        assert starts.shape == (300, 3)
        found = (starts.unsqueeze(1) == stored).all(-1)
        assert found.any(1).all()
        assert found.any(0).float().mean() > 0.9

    def test_current(self):
        bench = Bench(config({"algorithm.actor_starts": "current", "algorithm.actor_batch": 6}))
        batch = trajectories(steps=4)
        starts = bench.algorithm.start_observations(batch)
        found = (starts.unsqueeze(1) == batch["observation"].flatten(0, 1)).all(-1)
        assert found.sum(1).tolist() == [1] * 6
        assert found.sum(0).max() == 1
        assert len(bench.algorithm.start_observations(trajectories(steps=2))) == 4

    @pytest.mark.parametrize("starts", ["replay", "current"])
    def test_an_epoch_runs_with_either(self, starts):
        bench = Bench(config({"algorithm.actor_starts": starts}))
        assert math.isfinite(bench.step()["loss/actor"])


class Stopped(Exception):
    pass


class StopAt:
    """Raises when it is called for the ``call``-th time, from 0; counts."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.call + 1:
            raise Stopped


class TestBetweenTwoUpdates:
    """Where an epoch is left, it goes on: in the same process or, with what was saved, in another."""

    CONFIG = config({"algorithm.actor_updates": 2, "memory.model_micro_batch": 3})
    #: Three model updates; twice an actor update and two passes of two minibatches.
    PLACES = 3 + 2 * (1 + 2 * 2)

    def whole(self) -> tuple[Bench, list[dict[str, float]], torch.Tensor]:
        bench = Bench(self.CONFIG)
        torch.manual_seed(11)
        return bench, self.two_epochs(bench), torch.get_rng_state()

    def two_epochs(self, bench: Bench) -> list[dict[str, float]]:
        """Metrics of an epoch and the next, without the micro-batches, of which each process tells its own."""
        rows = [bench.step() for _ in range(2)]
        return [{key: value for key, value in row.items() if not key.startswith("memory/")} for row in rows]

    def left(self, bench: Bench, place: int) -> None:
        torch.manual_seed(11)
        bench.algorithm.between = StopAt(place)
        with pytest.raises(Stopped):
            bench.step()
        assert bench.algorithm.updates.made == place

    def test_it_is_asked_before_every_update(self):
        bench = Bench(self.CONFIG)
        bench.algorithm.between = asked = StopAt(-1)
        bench.step()
        assert asked.calls == self.PLACES == bench.algorithm.updates.made

    @pytest.mark.parametrize("place", range(PLACES))
    def test_left_there_and_continued(self, place):
        whole, expected, generator = self.whole()
        bench = Bench(self.CONFIG)
        self.left(bench, place)
        assert self.two_epochs(bench) == expected
        assert torch.equal(torch.get_rng_state(), generator)
        for name, weights in whole.snapshots().items():
            assert all(map(torch.equal, bench.snapshots()[name], weights)), name

    @pytest.mark.parametrize("place", range(PLACES))
    def test_left_there_and_restored(self, place):
        whole, expected, generator = self.whole()
        first, second = Bench(self.CONFIG), Bench(self.CONFIG)
        self.left(first, place)
        second.losses.actor.return_statistics.load_state_dict(first.losses.actor.return_statistics.state_dict())
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


class TestLearningRates:
    def test_fall_linearly_to_the_last(self):
        cfg = config({"training.epochs": 4, "algorithm.critic_lr": 1e-3})
        bench = Bench(cfg)
        logged = [bench.step() for _ in range(4)]
        for name, first in (("model", 3e-4), ("actor", 5e-4), ("critic", 1e-3)):
            expected = [first + (1e-5 - first) * epoch / 3 for epoch in range(4)]
            assert [row[f"lr/{name}"] for row in logged] == pytest.approx(expected)
        made = bench.optimizers["actor"]
        for fraction in (1.0, 1.5):
            made.set_progress(fraction)
            assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)

    def test_a_restored_algorithm_continues_the_schedule(self):
        """Which the loop counts; see test_loop.py."""
        bench, other = Bench(config()), Bench(config())
        bench.step()
        other.algorithm.load_state_dict(bench.algorithm.state_dict())
        other.epoch = bench.epoch
        rates = [b.step()["lr/actor"] for b in (bench, other)]
        assert rates[0] == rates[1] < 5e-4
        assert other.algorithm.started


class TestOptimizers:
    def test_settings(self):
        bench = Bench(config())
        betas = {name: tuple(made.optimizer.defaults["betas"]) for name, made in bench.optimizers.items()}
        assert betas == {"model": (0.9, 0.999), "actor": (0.7, 0.95), "critic": (0.7, 0.95)}
        assert [bench.optimizers[name].max_norm for name in NAMES] == [20.0, 1.0, 100.0]

    def test_norm_is_logged_before_clipping(self):
        bench = Bench(config())
        made = bench.optimizers["actor"]
        for p in made.parameters:
            p.grad = torch.full_like(p, 10.0)
        expected = 10 * math.sqrt(sum(p.numel() for p in made.parameters))
        norm = made.step()
        assert norm.item() == pytest.approx(expected)
        # Adam's first moment holds the clipped gradient.
        moments = [made.optimizer.state[p]["exp_avg"] / (1 - 0.7) for p in made.parameters]
        assert torch.cat([m.flatten() for m in moments]).norm().item() == pytest.approx(1.0, rel=1e-4)


class TestDiagnostics:
    def test_gradient_profile_disturbs_nothing(self):
        bench = Bench(config())
        bench.step()
        before = bench.snapshots()
        statistics = {k: v.clone() for k, v in bench.losses.actor.return_statistics.state_dict().items()}
        for p in bench.networks.actor.parameters():
            p.grad = torch.full_like(p, 3.0)
        profile = gradient_profile(bench.algorithm, bench.replay.sample_observations(8))
        assert list(profile) == [f"grad_profile/{t:02d}" for t in range(4)]
        assert all(type(value) is float and value >= 0 for value in profile.values())
        assert any(value > 0 for value in profile.values())
        for name in NAMES:
            assert not any(bench.changed(before)[name])
        assert all((p.grad == 3.0).all() for p in bench.networks.actor.parameters())
        others = (bench.networks.model, bench.networks.critic)
        assert all(p.grad is None for network in others for p in network.parameters())
        after = bench.losses.actor.return_statistics.state_dict()
        assert all(torch.equal(after[key], value) for key, value in statistics.items())

    @pytest.mark.parametrize("kind", ["mlp", "flow"])
    def test_metrics_are_plain(self, kind):
        bench = Bench(config({"model.dynamics.kind": kind}))
        row = bench.step()
        assert {type(value) for value in row.values()} == {int, float}
        expected = {"loss/model", "loss/actor", "loss/critic", "grad_norm/model", "grad_norm/actor", "grad_norm/critic"}
        assert expected <= set(row.keys())


class TestMemory:
    @pytest.mark.parametrize(
        "changes", [{"model.dynamics.kind": "mlp"}, {}, {"model.dynamics.checkpoint_substeps": True}]
    )
    def test_no_graph_is_alive_after_an_epoch(self, changes):
        bench = Bench(config(changes))
        kept, tensors = [], []
        others = live_graphs()  # those of other tests' fixtures in this process
        for _ in range(4):
            kept.append(bench.step())
            gradient_profile(bench.algorithm, bench.replay.sample_observations(8))
            assert live_graphs() == others
            tensors.append(sum(x.numel() for x in live_tensors()))
        # Beside the rows kept here, as a metrics history would, nothing piles up.
        assert tensors[1] == tensors[2] == tensors[3]
