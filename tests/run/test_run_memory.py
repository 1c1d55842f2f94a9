"""Memory while a run trains: logged, guarded, and the status ``memory`` before the kernel kills."""

from __future__ import annotations

import gc

import pytest
from forked_commands import run
from run_files import csv_rows, events, saved_epochs, summary_of, watching_threads
from training_cases import assert_equal, config, rows_of, run_with, weights_of

from pwm_torchrl.errors import OutOfMemory
from pwm_torchrl.memory.readings import read_memory
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.train import Run


class Leak:
    """Anonymous memory that a run takes and never gives back."""

    def __init__(self, per_epoch: int) -> None:
        self.per_epoch, self.held = per_epoch, []

    def __call__(self, run: Run) -> None:
        self.held.append(b"x" * self.per_epoch)
        run.loop.record.memory.watch.sample()  # or a second would have to pass


@pytest.mark.skipif(read_memory().processes is None, reason="memory of processes is not told here")
class TestGuard:
    def test_a_leak_ends_in_a_checkpoint(self, tmp_path, monkeypatch, capsys):
        """Not even close to the machine's memory, but to what the run was given."""
        cfg = config({"training.epochs": 40, "training.checkpoint_every": 0, "training.eval_every": 0})
        _, whole = run_with(monkeypatch, cfg, tmp_path / "whole")
        leak = Leak(32 * 10**6)
        gc.collect()
        room = read_memory().processes.own + 8 * leak.per_epoch
        cfg.memory.host_gib = room / cfg.memory.stop_at / 2**30
        with pytest.raises(OutOfMemory, match=r"^Stopped with a checkpoint after epoch ") as caught:
            run_with(monkeypatch, cfg, tmp_path / "parts", after_epoch=leak)
        leak.held.clear()
        message = str(caught.value)
        assert "\n" not in message
        assert "of the budget" in message
        assert "anonymous memory of the main process grew from" in message
        ended = summary_of(tmp_path / "parts")
        epoch = ended["epochs_done"]
        assert 2 <= epoch < 40  # 8 and a few: what earlier tests left in this process is given back meanwhile
        assert (ended["status"], ended["resume_exact"]) == ("memory", True)
        assert ended["peak_own_bytes"] >= room
        assert saved_epochs(tmp_path / "parts") == [epoch]
        (event,) = events(tmp_path / "parts", "memory")
        assert message in event["error"]
        assert not watching_threads()

        cfg.memory.host_gib = None
        summary, parts = run_with(monkeypatch, cfg, tmp_path / "parts", resume=True)
        assert (summary["status"], summary["epochs_done"], summary["resume_exact"]) == ("finished", 40, True)
        assert summary["peak_own_bytes"] >= ended["peak_own_bytes"]
        assert_equal(weights_of(parts), weights_of(whole))

    @pytest.mark.slow
    def test_the_command_line(self, tmp_path):
        """The job's exit code reaches the command that follows it, and the same command resumes the run."""
        pytest.importorskip("submitit")
        words = [f"run_dir={tmp_path / 'run'}", "memory=fixed", "algorithm.first_model_updates=2", "training.epochs=2"]
        words += ["training.eval_every=0", "training.video=false", "device=cpu", "model=mlp", "algorithm.max_updates=4"]

        short = run("submit", *words, "memory.host_gib=0.05")
        assert short.returncode == 75
        assert "error: Stopped with a checkpoint after epoch 1: memory that cannot be reclaimed reached" in short.stderr
        assert "of the budget, 51.2 MiB" in short.stderr
        assert "to resume with more memory (or a larger memory.host_gib, if that is the limit): python" in short.stderr
        assert "Traceback" not in short.stdout + short.stderr
        assert summary_of(tmp_path / "run")["status"] == "memory"
        again = run("submit", *words)
        assert again.returncode == 0, again.stderr
        assert summary_of(tmp_path / "run")["epochs_done"] == 2

    def test_a_run_that_is_over_is_not_stopped(self, tmp_path, monkeypatch):
        summary, run = run_with(monkeypatch, config({"training.epochs": 1}), tmp_path, during_epoch=alarm)
        assert run.loop.record.memory.check(warm=True) is not None
        assert summary["status"] == "finished"

    def test_what_a_user_stops_is_stopped(self, tmp_path, monkeypatch):
        def stop(run: Run) -> None:
            alarm(run)
            log = run.loop.log
            run.loop.log = lambda numbers: (log(numbers), run.stop.ask("test"))  # the epoch's last step

        summary, _ = run_with(monkeypatch, config(), tmp_path, during_epoch=stop)
        assert (summary["status"], summary["epochs_done"]) == ("stopped", 1)


def alarm(run: Run) -> None:
    """From now on there is too little memory."""
    run.loop.record.memory.guard.budget_bytes = 10**6


class TestWatch:
    @pytest.mark.skipif(read_memory().processes is None, reason="memory of processes is not told here")
    def test_every_epoch_is_logged(self, tmp_path, monkeypatch):
        seen: list[int] = []
        summary, _ = run_with(
            monkeypatch, config(), tmp_path, during_epoch=lambda run: seen.append(len(watching_threads()))
        )
        assert seen == [1] * 4
        assert not watching_threads()
        rows = csv_rows(tmp_path)
        for column in ("rss", "anon", "shmem", "own", "peak_own", "available", "processes"):
            assert all(float(row[f"memory/{column}"]) >= 0 for row in rows), column
        peaks = [int(row["memory/peak_own"]) for row in rows]
        assert all(int(row["memory/own"]) <= peak for row, peak in zip(rows, peaks, strict=True))
        assert peaks == sorted(peaks)
        assert peaks[-1] <= summary["peak_own_bytes"]
        assert not [key for row in rows_of(tmp_path) for key in row if key.startswith("memory/")]

    @pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()], ids=["error", "interrupt"])
    def test_no_thread_is_left(self, error, tmp_path, monkeypatch):
        def fail(run: Run) -> None:
            assert watching_threads()
            raise error

        with pytest.raises(type(error)):
            run_with(monkeypatch, config(), tmp_path, after_epoch=fail)
        assert not watching_threads()

    def test_if_watching_fails_the_run_goes_on(self, tmp_path, monkeypatch, capsys):
        def fail(run: Run) -> None:
            if run.loop.epoch == 1:
                watch = run.loop.record.memory.watch
                with monkeypatch.context() as patch:
                    patch.setattr(watch, "_read", lambda: 1 / 0)
                    watch._run(stopping=Soon())

        summary, _ = run_with(monkeypatch, config(), tmp_path, after_epoch=fail)
        assert (summary["status"], summary["epochs_done"]) == ("finished", 4)
        (event,) = events(tmp_path, "unwatched")
        assert "ZeroDivisionError" in event["error"]
        assert event["error"] in capsys.readouterr().err
        assert not watching_threads()

    def test_nothing_runs_before_training_and_after_it(self, tmp_path, monkeypatch):
        """Where environments may fork, and where a video is made."""
        seen: list[int] = []
        note = lambda *args, **kwargs: seen.append(len(watching_threads()))  # noqa: E731
        monkeypatch.setattr(Run, "draw", note)
        prelude = PolicyEvaluation.prelude

        def look(evaluation: PolicyEvaluation) -> None:
            note()
            prelude(evaluation)

        monkeypatch.setattr(PolicyEvaluation, "prelude", look)
        run_with(monkeypatch, config(), tmp_path)
        assert seen == [0, 0]


class Soon:
    """An event for which the watch's thread does not wait."""

    def wait(self, seconds: float) -> bool:
        return False
