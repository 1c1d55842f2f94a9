"""Running out of memory in an update: it is taken back and repeated in smaller parts. Runs: test_out_of_memory.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_cases import BATCH, ERRORS, PLACES, UPDATES, Fault, assert_same_run, do, make_bench, state_of
from tensordict import TensorDictBase
from torch import Tensor
from training_cases import Bench, assert_equal, config, rows_of, run_with, trajectories, weights_of

from pwm_torchrl.algorithm.base import MetricRow
from pwm_torchrl.algorithm.updates import Updates, is_out_of_memory
from pwm_torchrl.config import MemoryConfig
from pwm_torchrl.errors import OutOfMemory
from pwm_torchrl.run.debugging import live_nodes, live_tensors

ROOT = Path(__file__).parents[2]
WHERE = [(update, place) for update in UPDATES for place in PLACES if place != "sampling" or update == "model"]


def fail(bench: Bench, update: str, place: str, error: str = "cpu", times: int = 1) -> dict[str, float]:
    fault = Fault(bench, update, place, ERRORS[error], times)
    with fault.armed():
        logged = do(bench, update)
    assert fault.raised == times
    return logged


class TestRepeated:
    @pytest.mark.parametrize("epochs", [0, 1], ids=["first step ever", "later"])
    @pytest.mark.parametrize(("update", "place"), WHERE)
    def test_equals_a_run_with_that_micro_batch_from_this_update_on(self, update, place, epochs):
        """To the bit, wherever memory was refused: weights, optimizers, statistics, generator, log, the next epoch."""
        half = BATCH[update] // 2
        ours, theirs = make_bench(epochs=epochs), make_bench(epochs=epochs)
        theirs.algorithm.updates.reduced[update] = half
        logged = fail(ours, update, place)
        assert logged == do(theirs, update)
        assert ours.reduced == [(update, 2 * half, half)]
        assert ours.algorithm.updates.reduced == {update: half}
        assert_same_run(ours, theirs)

    @pytest.mark.parametrize("error", ERRORS)
    @pytest.mark.parametrize("place", ["forward", "in the step"])
    @pytest.mark.parametrize("update", UPDATES)
    def test_whoever_refused(self, update, place, error):
        ours, theirs = make_bench(epochs=1), make_bench(epochs=1)
        theirs.algorithm.updates.reduced[update] = BATCH[update] // 2
        assert fail(ours, update, place, error) == do(theirs, update)
        assert_equal(state_of(ours), state_of(theirs))

    @pytest.mark.parametrize("changes", [{}, {"model.dynamics.checkpoint_substeps": True}], ids=["", "checkpointed"])
    @pytest.mark.parametrize("update", UPDATES)
    @pytest.mark.parametrize("place", ["backward", "in the step"])
    def test_equals_the_whole_batch_in_float64(self, place, update, changes):
        """Up to rounding: memory changes no arithmetic."""
        data = trajectories().double()
        data["next", "done"] = torch.rand(data["next", "done"].shape) < 0.2
        ours, theirs = make_bench(changes, data), make_bench(changes, data)
        logged, expected = fail(ours, update, place, times=2), do(theirs, update)
        assert ours.algorithm.updates.used[update] == BATCH[update] // 4
        assert logged.keys() == expected.keys()
        for key, value in expected.items():
            assert logged[key] == pytest.approx(value, rel=1e-10, abs=1e-10), key
        whole = state_of(theirs)
        for key, value in state_of(ours).items():
            torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-10, msg=key)

    @pytest.mark.parametrize("update", UPDATES)
    def test_again_and_again(self, update):
        """From a configured size that is odd: 7, 4, 2, 1."""
        changes = {f"memory.{update}_micro_batch": 7}
        ours, theirs = make_bench(changes), make_bench(changes)
        theirs.algorithm.updates.reduced[update] = 1
        assert fail(ours, update, "backward", times=3) == do(theirs, update)
        assert ours.reduced == [(update, 7, 4), (update, 4, 2), (update, 2, 1)]
        assert_same_run(ours, theirs)

    def test_in_each_of_many_steps(self):
        """The copies that a step is taken back with are those of this step, not of one before."""
        ours, theirs = make_bench(epochs=2), make_bench(epochs=2)
        for size in (4, 2, 1):
            theirs.algorithm.updates.reduced["model"] = size
            assert fail(ours, "model", "in the step") == do(theirs, "model")
        assert_same_run(ours, theirs)

    def test_an_optimizer_that_was_loaded_in_between(self):
        """Loading puts other tensors in the place of the state."""
        ours, theirs = make_bench(epochs=1), make_bench(epochs=1)
        for bench in (ours, theirs):
            for optimizer in bench.optimizers.values():
                optimizer.optimizer.load_state_dict(optimizer.optimizer.state_dict())
        theirs.algorithm.updates.reduced["critic"] = 8
        assert fail(ours, "critic", "in the step") == do(theirs, "critic")
        assert_same_run(ours, theirs)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
def test_a_real_one():
    """In a process of its own, with a limit between what the whole batch takes and what halves of it take."""
    script = Path(__file__).with_name("limited_update.py")
    # Large tensors go to and from the system one by one, so that what is measured is what is needed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(UPDATES)
    for name, of in found.items():
        rows, whole, half, limited = (of[key] for key in ("rows", "whole", "half", "limited"))
        assert half["growth"] < 0.7 * whole["growth"], "a half needs clearly less"
        assert limited["reductions"] == [[name, rows, rows // 2]]
        assert limited["growth"] < (whole["growth"] + half["growth"]) / 2
        assert limited["state"] == half["state"] != whole["state"], "as if it had been halved from the beginning"


class TestNothingOfTheFailedUpdateIsLeft:
    @pytest.mark.parametrize(("update", "place"), WHERE)
    def test_no_tensor_and_no_graph(self, update, place):
        """When the update is tried again, what the failed one had made is gone."""
        bench = make_bench(epochs=2)  # the undo's copies of the optimizer's state are made in the second step
        undo = bench.algorithm.updates.executor.undo[update]
        others = live_nodes()
        before: set[int] = set()
        failed: list[weakref.ref[torch.Tensor]] = []
        left: list[list[torch.Size]] = []
        note, restore = undo.note, undo.restore

        def begin() -> None:
            note()
            before.update(id(x) for x in live_tensors())

        def take_back() -> None:
            restore()
            left.append([tuple(x().shape) for x in failed if x() is not None])
            assert live_nodes() == others

        undo.note, undo.restore = begin, take_back
        made = Fault(
            bench,
            update,
            place,
            ERRORS["torch"],
            seen=lambda: failed.extend(weakref.ref(x) for x in live_tensors() if id(x) not in before),
        )
        with made.armed():
            do(bench, update)
        assert failed, "the failed update had made tensors"
        assert left == [[]]


class TestGivingUp:
    @pytest.mark.parametrize("place", ["forward", "in the step"])
    @pytest.mark.parametrize("update", UPDATES)
    def test_at_one_row_everything_is_as_before(self, update, place):
        bench, expected = make_bench(epochs=1), make_bench(epochs=1)
        torch.manual_seed(12)
        # What is drawn before the update itself begins.
        if update != "model":
            observation = expected.replay.sample_observations(8)
        if update == "critic":
            expected.losses.actor.rollout_and_loss(expected.algorithm.encode(observation))
            torch.randperm(32)
        expected.generator = torch.get_rng_state()
        before = state_of(expected)
        fault = Fault(bench, update, place, ERRORS["cpu"], times=BATCH[update].bit_length())
        with fault.armed(), pytest.raises(OutOfMemory, match=f"^The {update} update does not fit") as caught:
            do(bench, update)
        message = str(caught.value)
        assert "\n" not in message
        assert "DefaultCPUAllocator: can't allocate memory" in message
        assert "model.dynamics.checkpoint_substeps=true" in message
        assert_equal(state_of(bench), before)
        assert [sizes[1:] for sizes in bench.reduced][-1] == (2, 1)
        # A size with which nothing succeeded is none: with more memory, a resumed run need not keep to it.
        assert bench.algorithm.updates.reduced == {}

    def test_what_succeeded_before_is_kept(self):
        bench = make_bench()
        fail(bench, "actor", "forward")
        with Fault(bench, "actor", "forward", ERRORS["cpu"], times=3).armed(), pytest.raises(OutOfMemory):
            do(bench, "actor")
        assert bench.algorithm.updates.reduced == {"actor": 4}


class TestOtherErrors:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("memory"),
            RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
            OSError(28, "full"),
            KeyError("x"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("update", UPDATES)
    def test_are_not_swallowed(self, update, error):
        bench = make_bench()
        with Fault(bench, update, "forward", lambda: error).armed(), pytest.raises(type(error)) as caught:
            do(bench, update)
        assert caught.value is error
        assert bench.reduced == []

    def test_neither_is_an_interrupt(self):
        bench = make_bench()
        with Fault(bench, "actor", "backward", KeyboardInterrupt).armed(), pytest.raises(KeyboardInterrupt):
            do(bench, "actor")
        assert bench.reduced == []

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(...)`"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(...)`"), False),
            (RuntimeError("std::bad_alloc"), True),
            (RuntimeError("CUDA error: device-side assert triggered"), False),
            (ValueError("out of memory"), False),
            (KeyError("out of memory"), False),
        ],
    )
    def test_what_counts_as_out_of_memory(self, error, expected):
        assert is_out_of_memory(error) == expected

    def test_a_cause_counts(self):
        outer = RuntimeError("a module failed")
        outer.__cause__ = MemoryError()
        assert is_out_of_memory(outer)


class TestState:
    def test_a_resumed_run_goes_on_with_reduced_sizes(self):
        bench, other = make_bench(), make_bench()
        fail(bench, "model", "forward")
        fail(bench, "critic", "forward", times=2)
        other.algorithm.load_state_dict(bench.algorithm.state_dict())
        assert other.algorithm.updates.reduced == {"model": 4, "critic": 4}
        do(other, "critic")
        assert other.algorithm.updates.used == {"critic": 4}

    def test_a_size_that_was_set_anew_counts_instead(self):
        """More memory, or another plan; an update whose size stays as it was keeps its reduction."""
        made, told = [], []
        executor = Bench(config()).algorithm.updates.executor
        for memory in (MemoryConfig(model_micro_batch=8), MemoryConfig(model_micro_batch=6)):
            made.append(Updates(executor, memory, lambda *what: told.append(what)))
        made[0].reduced = {"model": 2, "actor": 4}
        made[1].load_state_dict(made[0].state_dict())
        assert made[1].reduced == {"actor": 4}
        assert made[1].size("model", 100) == 6
        assert not told

    def test_sizes_are_logged_as_their_keys(self):
        bench = make_bench()
        with Fault(bench, "actor", "forward", ERRORS["cpu"]).armed():
            row = bench.step()
        logged = {key: value for key, value in row.items() if key.startswith("memory/")}
        assert logged == {
            "memory/model_micro_batch": 8,
            "memory/actor_micro_batch": 4,
            "memory/critic_micro_batch": 16,
        }


# Micro-batches: the arithmetic of the whole batch ---------------------------------------------------------------------


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
