"""Runs whose replay lies on disk: files beside the checkpoints, which must fit them or be refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from training_cases import CLOCKWORK, assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.data.segment_files import held_bytes
from pwm_torchrl.errors import StorageFault
from pwm_torchrl.memory.storage import replay_disk_bytes, steps_since_checkpoint
from pwm_torchrl.run.checkpoints import CheckpointStore
from pwm_torchrl.training import train

#: Two environments, 12 steps in replay, 4 new ones in an epoch: full after the third.
DISK = {"training.replay_storage": "disk", "training.replay_capacity": 24, "training.eval_every": 4}


def epochs_of(run_dir) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in CheckpointStore(run_dir).paths()]


class TestExact:
    @pytest.mark.parametrize(("before", "after"), [("memory", "disk"), ("disk", "memory"), ("disk", "device")])
    def test_on_another_storage(self, before, after, tmp_path, monkeypatch):
        """A new memory plan may move replay when a run is resumed."""
        changes = {**DISK, "training.epochs": 8, "training.replay_storage": before}
        _, whole = run_with(monkeypatch, config(changes), tmp_path / "straight")
        run_with(monkeypatch, config(changes), tmp_path / "parts", after_epoch=stop_after(5))
        changes["training.replay_storage"] = after
        torch.manual_seed(1234)
        summary, parts = run_with(monkeypatch, config(changes), tmp_path / "parts", resume=True)
        assert summary["resume_exact"]
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "straight")

    def test_from_the_one_before(self, tmp_path, monkeypatch):
        """The newest checkpoint is unreadable; the run goes on from the one before and dies after the next."""

        class Killed(BaseException):
            pass

        def kill(run):
            if run.loop.epoch == 7:
                raise Killed

        cfg = config({**DISK, "training.epochs": 9, "training.checkpoint_every": 3, "training.eval_every": 3})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_dir = tmp_path / "parts"
        run_with(monkeypatch, cfg, run_dir, after_epoch=stop_after(6))
        assert epochs_of(run_dir) == [3, 6]
        manifest = CheckpointStore(run_dir).paths()[-1] / "manifest.json"
        manifest.write_text(manifest.read_text()[:100])
        with pytest.warns(UserWarning, match="Trying the previous checkpoint"), pytest.raises(Killed):
            run_with(monkeypatch, cfg, run_dir, resume=True, after_epoch=kill)
        summary, parts = run_with(monkeypatch, cfg, run_dir, resume=True)
        assert summary["resume_exact"]
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "straight")

    def test_a_checkpoint_whose_data_were_written_over(self, tmp_path, monkeypatch):
        """It could be read when it was passed over, and it can be again: its replay is another writer's by now."""

        class Killed(BaseException):
            pass

        def kill(run):
            raise Killed

        cfg = config({**DISK, "training.epochs": 6, "training.checkpoint_every": 2})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_dir = tmp_path / "parts"
        run_with(monkeypatch, cfg, run_dir, after_epoch=stop_after(4))
        manifest = CheckpointStore(run_dir).paths()[-1] / "manifest.json"
        text = manifest.read_text()
        manifest.write_text(text[:100])
        with pytest.warns(UserWarning, match="checkpoint-0*4.*Trying the previous checkpoint"), pytest.raises(Killed):
            run_with(monkeypatch, cfg, run_dir, resume=True, after_epoch=kill)
        manifest.write_text(text)
        with pytest.warns(UserWarning, match=r"checkpoint-0*4 cannot be resumed: .*from step 8 on"):
            summary, parts = run_with(monkeypatch, cfg, run_dir, resume=True)
        assert summary["resume_exact"]
        assert_equal(weights_of(parts), weights_of(whole))

    def test_an_environment_that_cannot_be_saved(self, tmp_path, monkeypatch):
        """The newest steps become the last of their episodes, in the files too."""
        cfg = config({**DISK, "training.replay_capacity": 1000}, CLOCKWORK)
        run_with(monkeypatch, cfg, tmp_path, after_epoch=stop_after(2))
        summary, run = run_with(monkeypatch, cfg, tmp_path, resume=True)
        assert (summary["status"], summary["resume_exact"]) == ("finished", False)
        stored = run.source.samples.store.get(torch.tensor([0]), torch.tensor([0]), 16)[0]
        assert stored["observation"][:, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 6, 0]
        assert stored["next", "done"][:, 0].nonzero().flatten().tolist() == [6, 7, 14]
        assert float(rows_of(tmp_path)[-1]["data/valid_fraction"]) < 1


class TestMissing:
    def test_without_the_files_there_is_no_resuming(self, tmp_path, monkeypatch):
        cfg = config(DISK)
        run_with(monkeypatch, cfg, tmp_path, after_epoch=stop_after(2))
        shutil.rmtree(tmp_path / "replay")
        rows = rows_of(tmp_path)
        with pytest.raises(StorageFault, match=r"checkpoint-0*2 cannot be resumed: .*they do not exist") as caught:
            train(cfg, tmp_path, resume=True)
        assert "\n" not in str(caught.value)
        assert rows_of(tmp_path) == rows
        assert epochs_of(tmp_path) == [2]

    def test_a_file_that_only_the_newest_needs(self, tmp_path, monkeypatch):
        cfg = config({**DISK, "training.epochs": 6, "training.checkpoint_every": 2})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "straight")
        run_dir = tmp_path / "parts"
        run_with(monkeypatch, cfg, run_dir, after_epoch=stop_after(4))
        (run_dir / "replay" / "segment_000012.bin").unlink()
        with pytest.warns(UserWarning, match=r"checkpoint-0*4 cannot be resumed: .*segment_000012.bin.* is missing"):
            summary, parts = run_with(monkeypatch, cfg, run_dir, resume=True)
        assert summary["resume_exact"]
        assert_equal(weights_of(parts), weights_of(whole))


class TestWhatStays:
    @pytest.mark.parametrize(("every", "keep"), [(1, 2), (2, 1), (3, 2), (0, 2)])
    def test_capacity_and_what_came_since_the_oldest_checkpoint_kept(self, every, keep, tmp_path, monkeypatch):
        epochs = 10
        changes = {"training.epochs": epochs, "training.checkpoint_every": every, "training.keep_checkpoints": keep}
        most = []
        _, run = run_with(
            monkeypatch,
            config({**DISK, **changes}),
            tmp_path,
            after_epoch=lambda run: most.append(held_bytes(tmp_path / "replay")),
        )
        dims = (run.source.info.observation_dim, run.source.info.action_dim, 24, 2)
        assert max(most) <= replay_disk_bytes(*dims, steps_since_checkpoint(epochs, 4, every, keep))
        # Segments of one step; the best checkpoint is not among those that can be resumed.
        oldest = epochs_of(tmp_path)[-keep:][0]
        there = sorted(int(path.stem.rpartition("_")[2]) for path in (tmp_path / "replay").glob("*.bin"))
        assert there == list(range(max(0, 4 * oldest - 12), 4 * epochs))

    def test_the_description(self, tmp_path):
        train(config(DISK), tmp_path)
        described = json.loads((tmp_path / "replay" / "replay.json").read_text())
        assert described["num_envs"] == 2
        assert described["record"]["next.observation"] == {"shape": [3], "dtype": "float32"}
