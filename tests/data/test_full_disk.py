"""A disk of 32 MiB that fills up raises an error instead of a signal, and no earlier data are lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from replay_cases import H, random_steps
from safetensors.torch import load_file
from torchrl.checkpoint import Checkpoint
from training_cases import assert_equal, config, rows_of, run_with, weights_of

from pwm_torchrl import files as files_module
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.errors import StorageFault
from pwm_torchrl.files import Reserve, allocate, free_bytes, write_zeros
from pwm_torchrl.memory.storage import replay_bytes
from pwm_torchrl.run.checkpoints import FOLDER, METRIC, CheckpointStore, StateFileAdapter
from pwm_torchrl.run.claims import claimed
from pwm_torchrl.training import train

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("any_filesystem")


def occupy(folder, leave: int):
    """Fill a disk except for some bytes."""
    path = folder / "ballast"
    allocate(path, free_bytes(folder) - leave)
    return path


class TestStore:
    @pytest.mark.parametrize("fallback", [False, True], ids=["allocated", "zeros"])
    def test_full_in_the_middle(self, fallback, small_disk, monkeypatch):
        """Only part of the capacity fits, because other files appeared after the first check."""
        if fallback:
            monkeypatch.setattr(files_module, "_take_blocks", write_zeros)
        envs, observations = 8, 100
        capacity = 20 * MIB // replay_bytes(observations, 4, 1, 1)
        disk = TrajectoryReplay(capacity, envs, H, "disk", small_disk / "replay")
        memory = TrajectoryReplay(capacity, envs, H)
        ballast, failed = None, False
        while disk.steps < 2.2 * disk.capacity:
            batch = random_steps(disk.capacity // 20, envs, observations, 4)
            memory.extend(batch)
            if ballast is None and disk.steps > disk.capacity / 2:
                ballast = occupy(small_disk, leave=MIB)
            try:
                disk.extend(batch)
            except StorageFault as error:
                message = str(error)
                failed = True
                self.check_as_before(disk, disk.steps)
                ballast.unlink()
                disk.extend(batch)
            torch.manual_seed(0)
            expected = memory.sample_slices(50)
            torch.manual_seed(0)
            assert (disk.sample_slices(50) == expected).all()
        assert failed
        assert "segment_" in message
        assert "No space left on device (1.3 MiB were needed and 1.0 MiB are free)" in message
        assert "\n" not in message

    def check_as_before(self, disk, steps):
        assert len(disk) == steps * disk.num_envs
        state = disk.state_dict()
        assert state["steps"] == steps
        again = TrajectoryReplay(disk.capacity * disk.num_envs, disk.num_envs, H)
        again.folder = disk.store.folder
        again.load_state_dict(state)  # every file is complete
        drawn = []
        for replay in (disk, again):
            torch.manual_seed(1)
            drawn.append(replay.sample_slices(200))
        assert (drawn[0] == drawn[1]).all()


class TestCheckpoint:
    def test_of_more_than_there_is_room_for(self, small_disk):
        """TorchRL alone dies here of SIGBUS: it copies into a mapping of a sparse file."""
        model = torch.nn.Linear(1024, 1024)
        checkpoint = Checkpoint(model=model).register_adapter(object, StateFileAdapter())
        with claimed(small_disk) as claim:
            self.fill(CheckpointStore(small_disk, 5, claim), model, checkpoint, small_disk)

    def fill(self, kept, model, checkpoint, small_disk):
        for epoch in range(7):
            kept.save(checkpoint, epoch, {METRIC: 0.0})
        before = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.add_(1)
        occupy(small_disk, leave=MIB)
        with pytest.raises(
            StorageFault, match=r"make room for the checkpoint's file .*4\.0 MiB were needed and 1\.0 MiB"
        ):
            kept.save(checkpoint, 7, {METRIC: 0.0})
        assert kept.latest().name.endswith("6")
        assert not list((small_disk / FOLDER).rglob(".*"))
        Checkpoint(model=model).register_adapter(object, StateFileAdapter()).load(kept.latest())
        assert torch.equal(model.weight, before)

    def test_a_component_is_one_file_that_owns_its_blocks(self, tmp_path):
        state = {
            "a": torch.randn(300, 70),
            "b": [torch.arange(5), {"c": torch.tensor(True)}],
            "d": torch.empty(0, 3),
            "e": torch.randn(3, 5).bfloat16().t(),
            "f": (1, None, "text", 0.5),
            "g": np.arange(3, dtype=np.uint32),
        }

        class Component:
            def __init__(self):
                self.calls = 0

            def state_dict(self):
                self.calls += 1
                return state

            def load_state_dict(self, loaded):
                self.loaded = loaded

        component = Component()
        ours = Checkpoint(component=component).register_adapter(object, StateFileAdapter())
        ours.save(tmp_path / "saved")
        assert component.calls == 1
        (file,) = (tmp_path / "saved" / "components").rglob("*.*")
        assert file.stat().st_blocks * 512 >= file.stat().st_size
        ours.load(tmp_path / "saved")
        loaded = component.loaded
        for ours, theirs in (
            (loaded["a"], state["a"]),
            (loaded["b"][0], state["b"][0]),
            (loaded["b"][1]["c"], state["b"][1]["c"]),
            (loaded["d"], state["d"]),
            (loaded["e"], state["e"]),
        ):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert loaded["f"] == state["f"]
        assert loaded["g"].dtype == np.uint32
        assert loaded["g"].tolist() == [0, 1, 2]
        tensors = load_file(file)  # as safetensors reads it
        assert any(torch.equal(each, state["a"]) for each in tensors.values())


class TestRun:
    """The disk fills up after the fifth epoch; the last checkpoint is that of the fourth."""

    cfg = config(
        {
            "training.epochs": 8,
            "training.checkpoint_every": 2,
            "training.eval_every": 4,
            "training.replay_storage": "disk",
            "training.replay_capacity": 24,
        }
    )

    @pytest.mark.parametrize(
        ("part", "what"), [("replay", "segment_"), (FOLDER, r"checkpoint's file .*state.safetensors")]
    )
    def test_keeps_the_last_checkpoint_and_resumes_exactly(self, part, what, small_disk, tmp_path, monkeypatch):
        """While collecting or saving; the part that needs space is on a separate disk."""
        _, whole = run_with(monkeypatch, self.cfg, tmp_path / "straight")
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        (run_dir / part).symlink_to(small_disk)

        def fill(run):
            if run.loop.epoch == 5:
                occupy(small_disk, leave=0)

        with pytest.raises(StorageFault, match=what) as caught:
            run_with(monkeypatch, self.cfg, run_dir, after_epoch=fill)
        message = str(caught.value)
        assert "No space left on device" in message
        assert "resume the run from its last checkpoint" in message
        assert "\n" not in message
        (small_disk / "ballast").unlink()
        assert [saved.epoch for saved in CheckpointStore(run_dir).resume_candidates()] == [2, 4]
        summary, parts = run_with(monkeypatch, self.cfg, run_dir, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "straight")

    @pytest.mark.parametrize("leave", [0, 65_536])
    def test_all_of_a_run_on_a_disk_that_fills_up(self, leave, small_disk, tmp_path, monkeypatch):
        """Whichever of its files is the first that does not fit, and even its last words still do."""
        run_dir = small_disk / "run"
        run_dir.mkdir()

        def fill(run):
            if run.loop.epoch == 5:
                occupy(small_disk, leave)

        with pytest.raises(StorageFault, match="No space left on device"):
            run_with(monkeypatch, self.cfg, run_dir, after_epoch=fill)
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["status"] == "storage"
        # In the sixth epoch, or in the checkpoint at its end.
        assert summary["epochs_done"] == (5 if leave < 65_536 else 6)
        (small_disk / "ballast").unlink()
        _, whole = run_with(monkeypatch, self.cfg, tmp_path / "straight")
        summary, parts = run_with(monkeypatch, self.cfg, run_dir, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "straight")

    def test_no_room_from_the_beginning(self, small_disk):
        cfg = config({"training.replay_storage": "disk", "training.replay_capacity": 10_000_000})
        with pytest.raises(StorageFault, match=r"training\.replay_capacity=10000000 transitions of 34 bytes"):
            train(cfg, small_disk)
        assert not (small_disk / "replay").exists()
        assert json.loads((small_disk / "summary.json").read_text())["epochs_done"] == 0

    def test_room_for_the_last_words(self, small_disk):
        reserve = Reserve(small_disk)
        reserve.take()
        occupy(small_disk, leave=0)
        summary = small_disk / "summary.json"
        with pytest.raises(OSError, match="No space left"):
            summary.write_text("storage")
        reserve.free()
        summary.write_text("storage")
        reserve.free()
        with pytest.raises(StorageFault, match=r"summary in .*1\.0 MiB were needed"):
            Reserve(small_disk, 1 << 20).take()
        Reserve(small_disk, 1000).take()
