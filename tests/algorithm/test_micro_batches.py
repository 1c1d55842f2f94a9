"""Updates in micro-batches: the arithmetic of the whole batch. The losses alone: test_backward_in_parts.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from training_cases import Bench, assert_equal, config, rows_of, run_with, trajectories, weights_of

from pwm_torchrl.algorithm.base import MetricRow

SIZES = [1, 3, 8]
SHORTCUT = {"model.dynamics.condition_on_step_size": True, "model.loss.self_consistency_weight": 0.5}
MODELS = [
    {},
    {"model.dynamics.checkpoint_substeps": True},
    {"model.loss.flow_matching_weight": 1.0},
    {"model.loss.flow_matching_weight": 1.0, "model.loss.flow_matching_source": "attached", **SHORTCUT},
    {"model.loss.form": "tdmpc2"},
    {"model.reward_head": "two_hot", "model.dynamics.kind": "mlp"},
]


def name_of(changes: dict[str, Any]) -> str:
    return "-".join(key.rpartition(".")[2] for key in changes) or "flow"


def double_bench(changes: dict[str, Any]) -> Bench:
    """In float64, on episodes that end inside of slices, with a model that ends some rollouts."""
    torch.manual_seed(0)
    data = trajectories().double()
    data["next", "done"] = torch.rand(data["next", "done"].shape) < 0.2
    data["next", "terminated"] = data["next", "done"] & (torch.rand(data["next", "done"].shape) < 0.5)
    bench = Bench(config(changes), data, terminates=True)
    head = bench.networks.model.termination
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    logits: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, out: logits.append(out.detach()))
    bench.losses.actor.imagine(start(bench)["latent"])
    handle.remove()
    head.threshold = torch.cat(logits).sigmoid().quantile(0.9).item()
    return bench


def start(bench: Bench) -> TensorDictBase:
    torch.manual_seed(3)
    return bench.algorithm.encode(bench.replay.sample_observations(8))


class Watched:
    """What an update did: its gradients before clipping, its log and the state it leaves behind."""

    def __init__(self, bench: Bench, optimizer: str, update: Callable[[MetricRow], object]) -> None:
        self.gradients: list[list[Tensor]] = []
        made = bench.optimizers[optimizer]

        def step(before: Callable[[], None]) -> Tensor:
            self.gradients.append([p.grad.clone() for p in made.parameters])
            return type(made).step(made, before)

        made.step = step
        torch.manual_seed(5)
        row = MetricRow()
        self.result = update(row)
        del made.step
        self.logged = row.numbers()
        self.generator = torch.get_rng_state()
        self.statistics = {
            key: value.clone() for key, value in bench.losses.actor.return_statistics.state_dict().items()
        }
        self.micro_batches = set(bench.algorithm.updates.used.values())

    def assert_equals(self, whole: Watched, size: int) -> None:
        assert self.micro_batches == {size}
        assert len(self.gradients) == len(whole.gradients) > 0
        assert max(g.abs().max() for g in whole.gradients[0]) > 1e-4
        for ours, theirs in zip(self.gradients, whole.gradients, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
        assert self.logged.keys() == whole.logged.keys()
        for key, value in whole.logged.items():
            assert self.logged[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key
        assert torch.equal(self.generator, whole.generator)
        for key, value in whole.statistics.items():
            torch.testing.assert_close(self.statistics[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", MODELS, ids=name_of)
@pytest.mark.parametrize("size", SIZES)
def test_model_update(changes, size):
    """Ends of episodes make the parts' numbers of valid steps differ."""

    def update(micro_batch):
        bench = double_bench({**changes, "memory.model_micro_batch": micro_batch})
        return Watched(bench, "model", bench.algorithm.update_model)

    whole = update(None)
    assert 0.3 < whole.logged["data/valid_fraction"] < 0.95
    update(size).assert_equals(whole, size)


@pytest.mark.parametrize("changes", [{}, MODELS[1], MODELS[5], {"algorithm.detach": False}], ids=name_of)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_actor_update(changes, normalize, size):
    """The parts' rollouts are put together again, for the critics."""

    def update(micro_batch):
        bench = double_bench(
            {**changes, "algorithm.normalize_returns": normalize, "memory.actor_micro_batch": micro_batch}
        )
        observation = bench.replay.sample_observations(8)
        return Watched(bench, "actor", lambda row: bench.algorithm.update_actor(observation, row))

    whole, parts = update(None), update(size)
    assert 0 < whole.logged["imagination/terminated"] < 1
    parts.assert_equals(whole, size)
    # A count of 1e-4 stands for the beginning: one update, with all of the batch.
    assert parts.statistics["count"].item() == pytest.approx(8.0001 if normalize else 0.0001)
    assert set(parts.result.keys(True, True)) == set(whole.result.keys(True, True))
    for key, value in whole.result.items(True, True):
        torch.testing.assert_close(parts.result[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_critic_update(size):
    """Four updates, of minibatches of eight states of which some are after a rollout's end."""

    def update(micro_batch):
        bench = double_bench({"algorithm.critic_minibatches": 4, "memory.critic_micro_batch": micro_batch})
        _, imagined = bench.losses.actor.rollout_and_loss(start(bench))
        mask = imagined["collector", "mask"]
        assert mask.any()
        assert not mask.all()
        bench.networks.critic.params[-1].data.normal_(generator=torch.Generator().manual_seed(1))
        return Watched(bench, "critic", lambda row: bench.update_critic(imagined, row))

    whole, parts = update(None), update(size)
    assert len(whole.gradients) == 8
    parts.assert_equals(whole, size)


@pytest.mark.parametrize("size", [1, 3])
def test_epochs(size):
    """All updates of two epochs, in parts and whole."""
    ends = []
    for micro_batch in (None, size):
        keys = ("model", "actor", "critic")
        bench = double_bench({f"memory.{key}_micro_batch": micro_batch for key in keys})
        torch.manual_seed(5)
        rows = [bench.step() for _ in range(2)]
        ends.append((bench.snapshots(), rows, torch.get_rng_state()))
        assert [rows[-1][f"memory/{key}_micro_batch"] for key in keys] == [micro_batch or n for n in (8, 8, 16)]
    (whole, logged, generator), (parts, logged_parts, same_generator) = ends
    assert torch.equal(generator, same_generator)
    for name, weights in whole.items():
        for x, y in zip(weights, parts[name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    for ours, theirs in zip(logged_parts, logged, strict=True):
        assert ours.keys() == theirs.keys()
        for key in [key for key in theirs.keys() if not key.startswith("memory/")]:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-9, msg=key)


def test_a_size_above_the_batch_is_the_batch(tmp_path, monkeypatch):
    """To the bit, in a run."""
    keys = ("model", "actor", "critic")
    _, whole = run_with(monkeypatch, config(), tmp_path / "whole")
    larger = config({f"memory.{key}_micro_batch": 1000 for key in keys})
    _, same = run_with(monkeypatch, larger, tmp_path / "larger")
    assert_equal(weights_of(same), weights_of(whole))
    assert rows_of(tmp_path / "larger") == rows_of(tmp_path / "whole")
