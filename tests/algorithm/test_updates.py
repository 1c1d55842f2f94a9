"""Running out of memory in an update: it is taken back and repeated in smaller parts. Runs: test_out_of_memory.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from recovery_cases import BATCH, ERRORS, PLACES, UPDATES, Fault, assert_same_run, do, make_bench, state_of
from training_cases import Bench, assert_equal, config, trajectories

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
