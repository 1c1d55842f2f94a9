"""Runs whose updates memory is too small for: smaller parts, or a checkpoint. Watch and guard: test_run_memory.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from recovery_cases import BATCH, ERRORS
from run_files import csv_rows, events, saved_epochs, summary_of, watching_threads
from training_cases import assert_equal, config, rows_of, run_with, stop_after, weights_of

from pwm_torchrl.errors import OutOfMemory
from pwm_torchrl.run.train import Run
from pwm_torchrl.training import train


def admits(update: str, rows: int, after: int) -> Callable[[Run], None]:
    """A hook: after some epochs, memory is left for so many rows of an update."""

    def shrink(run: Run) -> None:
        if run.loop.epoch != after:
            return
        losses = run.algorithm.losses
        loss = {"model": losses.model, "actor": losses.actor, "critic": losses.critic}[update]
        backward = type(loss).backward

        def limited(data: Any, size: int) -> Any:
            if size > rows:
                raise ERRORS["cpu"]()
            return backward(loss, data, size)

        loss.backward = limited

    return shrink


class TestSmallerParts:
    @pytest.mark.parametrize("update", BATCH)
    def test_the_run_goes_on_and_a_resumed_one_too(self, update, tmp_path, monkeypatch):
        """With the size that fits, which the checkpoint holds: where the run is stopped makes no difference."""
        rows = BATCH[update] // 4
        hook = admits(update, rows, after=1)
        summary, whole = run_with(monkeypatch, config(), tmp_path / "whole", during_epoch=hook)
        run_with(monkeypatch, config(), tmp_path / "parts", during_epoch=hook, after_epoch=stop_after(2))
        _, parts = run_with(monkeypatch, config(), tmp_path / "parts", resume=True)
        assert (summary["status"], summary["epochs_done"], summary["resume_exact"]) == ("finished", 4, True)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
        for name in ("whole", "parts"):
            told = events(tmp_path / name, "micro_batch")
            assert [(e["update"], e["refused"], e["size"]) for e in told] == [
                (update, 4 * rows, 2 * rows),
                (update, 2 * rows, rows),
            ]
            assert "can't allocate memory" in told[0]["error"]
            column = f"memory/{update}_micro_batch"
            logged = [row[column] for row in csv_rows(tmp_path / name)]
            assert logged == [str(size) for size in (4 * rows, rows, rows, rows)]


class TestGivingUp:
    @pytest.mark.parametrize("update", BATCH)
    @pytest.mark.parametrize("after", [0, 2])
    def test_saves_and_ends_and_resumes_with_more_memory(self, update, after, tmp_path, monkeypatch):
        """In the middle of an epoch, of whose data none would be saved before the fourth: it goes on right there."""
        cfg = config({"training.checkpoint_every": 4, "training.eval_every": 4})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
        run_dir = tmp_path / "parts"
        with pytest.raises(
            OutOfMemory, match=f"^The {update} update does not fit into memory even with a micro-batch of 1"
        ):
            run_with(monkeypatch, cfg, run_dir, during_epoch=admits(update, 0, after))
        ended = summary_of(run_dir)
        assert (ended["status"], ended["epochs_done"], ended["resume_exact"]) == ("memory", after, True)
        assert saved_epochs(run_dir) == [after]
        (event,) = events(run_dir, "memory")
        assert event["epoch"] == after
        assert event["error"].startswith(f"OutOfMemory: The {update} update does not fit")
        assert not watching_threads()
        sizes: list[int | None] = []
        summary, parts = run_with(
            monkeypatch,
            cfg,
            run_dir,
            resume=True,
            after_epoch=lambda run: sizes.append(run.algorithm.updates.used[update]),
        )
        assert (summary["status"], summary["epochs_done"], summary["resume_exact"]) == ("finished", 4, True)
        assert sizes == [BATCH[update]] * (4 - after), "what never worked is not kept"
        assert summary["agent_steps"] == parts.source.samples.collected == 4 * 8
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(run_dir) == rows_of(tmp_path / "whole")

    def test_again_and_again_at_the_same_place(self, tmp_path, monkeypatch):
        cfg = config({"training.checkpoint_every": 2})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
        with pytest.raises(OutOfMemory):
            run_with(monkeypatch, cfg, tmp_path / "parts", during_epoch=admits("actor", 0, after=2))

        def never(*arguments: Any) -> None:
            raise OutOfMemory("The critic update does not fit")

        with monkeypatch.context() as patch:
            patch.setattr("pwm_torchrl.algorithm.updates.Updates.critic", never)
            with pytest.raises(OutOfMemory):
                train(cfg, tmp_path / "parts", resume=True)
        summary, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert (summary["status"], summary["resume_exact"], summary["restarts"]) == ("finished", True, 2)
        assert_equal(weights_of(parts), weights_of(whole))
        assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")

    def test_where_not_even_the_checkpoint_fits(self, tmp_path, monkeypatch, capsys):
        """The error that ended the run is told, and what was saved before stays."""

        def shrink(run: Run) -> None:
            admits("actor", 0, after=3)(run)
            if run.loop.epoch == 3:
                monkeypatch.setattr(run.source.samples, "state_dict", lambda: bytearray(1 << 62))

        with pytest.raises(OutOfMemory, match=r"^The actor update does not fit"):
            run_with(monkeypatch, config(), tmp_path, during_epoch=shrink)
        assert summary_of(tmp_path)["status"] == "memory"
        assert summary_of(tmp_path)["resume_exact"]
        assert saved_epochs(tmp_path) == [2]
        assert not list((tmp_path / "checkpoints").glob(".*"))
        (event,) = events(tmp_path, "unsaved")
        assert "Memory ran out" in event["error"]
        assert "no checkpoint after epoch 3, earlier ones are kept" in capsys.readouterr().err

    def test_outside_of_the_updates(self, tmp_path, monkeypatch):
        """In an evaluation, say: no smaller batch would help there."""

        def refuse(run: Run) -> None:
            if run.loop.epoch == 3:
                raise MemoryError

        with pytest.raises(OutOfMemory, match=r"^Memory ran out in a place where smaller micro-batches") as caught:
            run_with(monkeypatch, config(), tmp_path, after_epoch=refuse)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert "\n" not in str(caught.value)
        assert summary_of(tmp_path)["status"] == "memory"
        assert saved_epochs(tmp_path) == [2]
