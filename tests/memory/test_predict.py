"""Items and totals of a prediction."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_cases import config

from pwm_torchrl.envs.standard import EnvInfo
from pwm_torchrl.memory import predict as predict_module
from pwm_torchrl.memory.predict import CACHE, DEVICE, DISK, HOST, Choices, Item, Prediction, predict
from pwm_torchrl.memory.readings import MIB, read_process
from pwm_torchrl.memory.storage import replay_bytes, replay_disk_bytes, steps_since_checkpoint
from pwm_torchrl.memory.trace import UpdateTracer

FACTS = EnvInfo("test", 3, 1, 30, 1, 2, False)


def items(prediction: Prediction, what: str) -> list[Item]:
    return [item for item in prediction.items if item.what == what]


def one(prediction: Prediction, what: str) -> Item:
    (item,) = items(prediction, what)
    return item


class TestTotals:
    def test_only_the_largest_shared_item_counts(self):
        rows = (Item("a", 1, HOST, ""), Item("b", 20, HOST, "", shared=True), Item("c", 300, HOST, "", shared=True))
        prediction = Prediction((*rows, Item("d", 7, DEVICE, "")), HOST, True, base=1)
        assert prediction.total(HOST) == 301
        assert prediction.growth == 300
        assert prediction.total(DEVICE) == 7
        assert prediction.total(DISK) == 0

    def test_of_a_run(self):
        found = predict(config(), FACTS, Choices())
        shared = [item.bytes for item in found.items if item.place == HOST and item.shared]
        rest = sum(item.bytes for item in found.items if item.place == HOST and not item.shared)
        assert len(shared) == 4  # three updates, and the copy of the replay
        assert found.total(HOST) == rest + max(shared)
        assert json.loads(json.dumps(found.as_dict()))["totals"][HOST] == found.total(HOST)

    def test_the_base_is_this_process(self):
        held = read_process().own
        found = predict(config(), FACTS, Choices())
        assert found.base == one(found, "Python and libraries").bytes == pytest.approx(held, rel=0.2)
        assert predict(config(), FACTS, Choices(), framework=(7, "said")).base == 7

    def test_base_is_an_estimate_without_proc(self, monkeypatch):
        monkeypatch.setattr(predict_module, "read_process", lambda: None)
        item = one(predict(config(), FACTS, Choices()), "Python and libraries")
        assert item.bytes == predict_module.FRAMEWORK_BYTES
        assert "estimate" in item.why


class TestPlaces:
    def test_on_the_host_nothing_is_on_a_gpu(self):
        found = predict(config(), FACTS, Choices())
        assert (found.compute, found.verified) == (HOST, True)
        assert found.total(DEVICE) == 0

    def test_on_a_gpu_the_host_keeps_libraries_and_environments(self):
        host, gpu = (predict(config(), FACTS, Choices(), compute) for compute in (HOST, DEVICE))
        assert (gpu.compute, gpu.verified) == (DEVICE, False)
        for what in ("parameters", "optimizer state", "undo copies", "model update", "actor update"):
            assert one(gpu, what).place == DEVICE
            assert one(gpu, what).bytes == one(host, what).bytes
        assert one(gpu, "environments").place == HOST
        assert one(gpu, "CUDA libraries").bytes > 0
        assert not items(gpu, "library buffers")
        assert gpu.total(HOST) > gpu.base

    def test_samples_are_pinned_unless_the_replay_is_on_the_gpu(self):
        cfg = config()
        sampled = UpdateTracer(cfg, FACTS).transient("model").data
        for storage in ("memory", "disk"):
            pinned = one(predict(cfg, FACTS, Choices(replay_storage=storage), DEVICE), "pinned buffer")
            assert (pinned.place, pinned.bytes) == (HOST, 2 * sampled)
        assert not items(predict(cfg, FACTS, Choices(replay_storage="device"), DEVICE), "pinned buffer")
        assert not items(predict(cfg, FACTS, Choices()), "pinned buffer")

    def test_the_replay(self):
        cfg = config()
        t, a = cfg.training, cfg.algorithm
        size = replay_bytes(3, 1, t.replay_capacity, 2)
        for storage, compute, place in (
            ("memory", HOST, HOST),
            ("memory", DEVICE, HOST),
            ("device", DEVICE, DEVICE),
            ("device", HOST, HOST),  # the device of the networks is the CPU
        ):
            found = predict(cfg, FACTS, Choices(replay_storage=storage), compute)
            assert (one(found, "replay").place, one(found, "replay").bytes) == (place, size)
            assert one(found, "copy of the replay").place == HOST
            assert one(found, "replay in checkpoints").bytes == (t.keep_checkpoints + 2) * size
        steps = steps_since_checkpoint(t.epochs, a.horizon, t.checkpoint_every, t.keep_checkpoints)
        files = replay_disk_bytes(3, 1, t.replay_capacity, 2, steps)
        on_disk = predict(cfg, FACTS, Choices(replay_storage="disk"))
        assert {item.place: item.bytes for item in items(on_disk, "replay")} == {DISK: files, CACHE: files}
        assert not items(on_disk, "replay in checkpoints")

    def test_checkpoints_are_on_disk(self):
        cfg = config()
        kept = UpdateTracer(cfg, FACTS).persistent
        found = one(predict(cfg, FACTS, Choices()), "checkpoints")
        assert (found.place, found.bytes) == (DISK, 4 * (kept.parameters + kept.optimizer))

    def test_environments_of_training_and_evaluation(self):
        few, many = (predict(config(), replace(FACTS, num_envs=n), Choices()) for n in (2, 10))
        assert one(many, "environments").bytes - one(few, "environments").bytes == 8 * predict_module.ENVIRONMENT_BYTES
        assert one(many, "collected batch").bytes == 5 * one(few, "collected batch").bytes


class TestChoices:
    def test_apply_without_a_tracer(self):
        """The choice takes precedence over the configuration."""
        cfg = config({"model.dynamics.substeps": 4, "algorithm.model_batch": 64})
        assert cfg.model.dynamics.checkpoint_substeps is None
        kept, recomputed = (predict(cfg, FACTS, Choices(checkpoint_substeps=choice)) for choice in (False, True))
        assert one(recomputed, "model update").bytes < 0.7 * one(kept, "model update").bytes
        assert "substeps recomputed" in one(recomputed, "model update").why
        assert "recomputed" not in one(recomputed, "critic update").why
        assert cfg.model.dynamics.checkpoint_substeps is None

    def test_items_state_the_split(self):
        found = predict(config({"algorithm.model_batch": 64}), FACTS, Choices(model_micro_batch=16))
        assert one(found, "model update").why.startswith("64 slices in micro-batches of 16: activations ")
        assert one(found, "actor update").why.startswith("8 rollouts at once: activations ")

    def test_with_micro_batch_changes_one_update(self):
        choices = Choices(1, 2, 3, True, "disk")
        assert choices.with_micro_batch("actor", None) == Choices(1, None, 3, True, "disk")
        assert [choices.micro_batch(update) for update in ("model", "actor", "critic")] == [1, 2, 3]


@pytest.mark.parametrize(("place", "large"), [(HOST, True), (DEVICE, False)])
def test_freed_memory_is_returned_where_updates_on_the_host_are_large(place, large):
    update = Item("model update", 500 * MIB, place, "", shared=True)
    assert Prediction((update,), place, True, 0).returns_freed_memory is large
    small = replace(update, bytes=MIB)
    assert not Prediction((small,), place, True, 0).returns_freed_memory
    replay = replace(update, what="copy of the replay")  # one block
    assert not Prediction((small, replay), place, True, 0).returns_freed_memory


# Freed memory is returned to the kernel -------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]
#: Writes 256 blocks of 512 KiB and frees every second one. The kernel gets them back only if each has its own mapping.
PROGRAM = """
import ctypes, sys
from pwm_torchrl.memory.predict import return_freed_memory
from pwm_torchrl.memory.readings import read_process

returned = sys.argv[1] == "return" and return_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [
    ctypes.c_void_p]
size = 512 * 1024
library.free(library.malloc(8 * size))  # makes the threshold rise, as larger tensors do
start = read_process().anon
blocks = [library.malloc(size) for _ in range(256)]
for block in blocks:
    ctypes.memset(block, 1, size)
full = read_process().anon - start
for block in blocks[::2]:
    library.free(block)
print(returned, full, read_process().anon - start)
"""


def held(mode: str) -> tuple[str, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    returned, full, after = done.stdout.split()
    return returned, int(full), int(after)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_blocks_are_returned():
    returned, full, after = held("return")
    assert returned == "True"
    assert full >= 128 * 2**20
    assert after == pytest.approx(full / 2, rel=0.1)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_blocks_are_kept_by_default():
    _, full, after = held("keep")
    assert after > 0.9 * full


def test_another_c_library_is_not_changed(monkeypatch):
    monkeypatch.setattr(predict_module.ctypes, "CDLL", lambda name: object())
    assert predict_module.return_freed_memory() is False
